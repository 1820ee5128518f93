// Package browsertest tests the pages of goxui in Chromium, on a real server. It needs Debian's package
// chromium, or another Chrome in the PATH.
package browsertest

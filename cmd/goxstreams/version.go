package main

import "runtime/debug"

// version is the module's: that of `go install ...@v1.2.3`, or what the go command makes of a clone's commit.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return versionOf(info)
}

// versionOf returns the version of the command's module. A test's binary has none.
func versionOf(info *debug.BuildInfo) string {
	if info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}

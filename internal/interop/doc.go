// Package interop tests goxstreams together with the real watermill-redisstream
// and Watermill's components. It is a module of its own, so that users of
// goxstreams do not get these as dependencies.
package interop

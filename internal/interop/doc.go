// Package interop holds goxstreams against the real watermill-redisstream. It
// has tests only, in a module of its own, so that those who use goxstreams do
// not get watermill-redisstream among their dependencies.
package interop

// Package redisx contains what the library needs from go-redis beyond commands:
// kinds of clients and the nodes of keys (client.go), commands that must not be
// resent (once.go), connections for blocking reads (conn.go, route.go), and error
// classes (errors.go). It knows nothing about streams.
package redisx

// Package redisx is what the library needs of go-redis beyond commands: which kind
// of client this is and where its keys are (client.go), commands that must not be
// sent twice (once.go), connections for reads that block (conn.go, route.go), and
// what an error says (errors.go). It knows no streams.
package redisx

package testserver

import "go.uber.org/goleak"

// LeakOptions are the exceptions for a test that checks for leaked goroutines while
// the shared server runs. Main, which checks after closing the server, needs only
// the first.
func LeakOptions() []goleak.Option {
	return []goleak.Option{
		ryukConnection(),
		// Waits for the end of a server that is a child process.
		goleak.IgnoreAnyFunction("github.com/goxstreams/watermill-goxstreams/internal/testserver.(*process).reap"),
		// Accepts connections of the embedded server.
		goleak.IgnoreAnyFunction("github.com/alicebob/miniredis/v2/server.newServer.func1"),
	}
}

// ryukConnection is the connection that testcontainers-go keeps open until the
// process ends, so that Ryuk notices the end.
func ryukConnection() goleak.Option {
	return goleak.IgnoreAnyFunction("github.com/testcontainers/testcontainers-go.(*Reaper).connect.func1")
}

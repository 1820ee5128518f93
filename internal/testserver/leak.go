package testserver

import "go.uber.org/goleak"

// LeakOptions are the exceptions for a test that looks for leaked goroutines while the shared server runs. Main, which looks
// when that is closed, needs only the first.
func LeakOptions() []goleak.Option {
	return []goleak.Option{
		ryukConnection(),
		// Waits for the end of a server that is a child process.
		goleak.IgnoreAnyFunction("github.com/goxstreams/watermill-goxstreams/internal/testserver.(*process).reap"),
		// Accepts the embedded server's connections.
		goleak.IgnoreAnyFunction("github.com/alicebob/miniredis/v2/server.newServer.func1"),
	}
}

// ryukConnection is what testcontainers-go keeps open until the process ends, so that its Ryuk notices that end.
func ryukConnection() goleak.Option {
	return goleak.IgnoreAnyFunction("github.com/testcontainers/testcontainers-go.(*Reaper).connect.func1")
}

// Package goxstreamstest is for the tests of programs that use watermill-goxstreams.
//
// # One delivery
//
// A [Receiver] is what a test delivers messages to: a [Handler], a [ConsumerHandler] or a
// [Worker]. [Receiver.Deliver] makes one [Delivery], chosen by the test, and returns a
// [Result], which says what became of it and has assertions:
//
//	bill := goxstreamstest.ConsumerHandler(handler, goxstreams.SubscriberConfig{}, retry.Middleware)
//	bill.Deliver(t, goxstreamstest.Delivery{Message: order, Count: 3}).RequireRetried(t, 4*time.Second)
//
// What decides is the library itself: a Subscriber, in a Watermill router, reads the entry
// from an embedded server. Nothing waits for the delay of a retry: a Deliver takes some
// milliseconds.
//
// # An embedded server
//
// [NewServer] starts a server of the test's own, for tests of whole programs. It works within
// a bubble of testing/synctest, too, in which nothing waits for retries.
//
// The server is [miniredis]. How it differs from Redis:
//
//   - A read waits for 50 ms at most, and then answers that there is nothing, since it cannot
//     be woken (CLIENT UNBLOCK) and Close would wait for it. BLOCK 0 waits forever.
//   - XCLAIM takes entries that are not idle for long enough. A group's lag
//     (TopicStats.Lag) is the length of the stream.
//   - PublisherConfig.Idempotence is not supported. Retention.KeepLast trims all that is
//     acked.
//   - It keeps nothing on disk, has no users with rights and no limit of memory, is no Cluster
//     and no Sentinel, and cannot be frozen or killed.
//
// Tests of takeovers, failovers and rights need a real server.
//
// [miniredis]: https://github.com/alicebob/miniredis
package goxstreamstest

// Package goxstreams is a Watermill Pub/Sub over Redis Streams consumer groups.
//
// A Publisher adds messages to a stream: all messages of a call or none. A
// Subscriber delivers them at least once, to a Watermill router or to any reader of
// its channel. A message stays pending in Redis until it is acked or moved to the
// topic's dead-letter stream, even if processes crash in between. Redis counts the
// deliveries, so retry limits hold across crashes and restarts.
//
//	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, logger)
//	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
//		Client:        client,
//		ConsumerGroup: "billing",
//		Retry:         &goxstreams.Retry{MaxRetries: 5},
//	}, logger)
//
// A handler's error decides what happens to its message: see Permanent, RetryAfter
// and Snooze, and the middlewares Retry and DeadLetter, which act on them.
// DeadLetterQueue lists, replays and deletes dead letters. Producer and Consumer
// are a typed layer that works with or without a router: a Worker has one method
// for messages, one for malformed entries, and one for dead messages.
//
// Subscriber.Stats serves metrics and readiness probes. Subscriber.TopicStats asks
// Redis for the consumer lag of a group. With Idempotence, a Publish call whose
// outcome is unknown can be repeated.
//
// # Guarantees
//
//   - Delivery is at least once. An entry that is trimmed or deleted while pending
//     is logged and counted.
//   - A handler that fails sees a message at most MaxRetries+1 times, a handler
//     that kills its process at most MaxRetries+2 times. Then the message is dead.
//   - Leases are renewed while the process is alive, however slow the handler is. A
//     crashed process's messages are taken over within 4/3 ClaimMinIdle + 2
//     ClaimInterval.
//   - A malformed entry stops nothing: it goes to OnBroken.
//   - With MaxConcurrency 1, a subscription delivers in stream order and redelivers
//     a nacked message before its successors. Messages of a crashed consumer are
//     delivered when they are taken over.
//   - Close, and the end of Subscribe's context, drain the subscription: handlers
//     finish, their acks reach Redis, and all other messages are released for other
//     consumers to take at once. A release does not count as a delivery, and a
//     handler that fails because of the shutdown does not count as failed.
//   - Dead-lettering is atomic and happens once.
//   - Subscriptions recover when Redis restarts, fails over, is flushed, loses the
//     group or refuses commands. Stats shows the outage.
//   - The library never closes the client, exits the process or traps signals.
//
// Without a ConsumerGroup a subscription is a fan-out: it receives every message
// that is published after Subscribe has returned. Redis keeps only its read
// position, for a minute, so that Retention and DeleteAcked do not trim unread
// entries.
//
// # The life of an entry
//
// A subscription reads entries ahead of its handlers, and delivers each. After a nack
// an entry waits, without a handler, and is claimed again when it is due, by the same
// consumer: its delivery count grows by one. It can also move to the dead-letter
// stream: when its retries are used up, when its handler's error says so, or when it
// cannot be unmarshaled. Until it is acked or moved it is pending in Redis, and its
// consumer renews its lease every third of ClaimMinIdle. Other consumers claim the
// entries whose lease has expired, and first those that a closed subscription has
// released: these are pending for a consumer named "released".
//
// ARCHITECTURE.md describes the internals and which file does what.
package goxstreams

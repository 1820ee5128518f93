// Package goxstreams is a Watermill Pub/Sub over Redis Streams consumer groups.
//
// A Publisher adds messages to a stream, all of a call or none. A Subscriber
// hands them to a Watermill router, or to whoever reads its channel, at least
// once: a message stays pending in Redis until it is acked or in the topic's
// dead-letter stream, whatever crashes in between. How often it was delivered is
// Redis's own count, so that retry limits outlive processes.
//
//	pub, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, logger)
//	sub, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{
//		Client:        client,
//		ConsumerGroup: "billing",
//		Retry:         &goxstreams.Retry{MaxRetries: 5},
//	}, logger)
//
// Handlers say by their error what shall become of a message: see Permanent,
// RetryAfter and Snooze, and the middlewares Retry and DeadLetter, which heed them.
// DeadLetterQueue looks at dead letters, replays and deletes them. Producer and
// Consumer are a typed layer, with or without a router: a Worker has a method for
// the message, one for the broken entry, and one for the dead message.
//
// Subscriber.Stats is for metrics and readiness probes, Subscriber.TopicStats asks
// Redis how far behind a group is. With Idempotence a call of Publish can be
// repeated when it is not known what became of it.
//
// # What holds
//
//   - At least once. What is trimmed or deleted while pending is logged and
//     counted, not dropped silently.
//   - A handler that fails sees a message at most MaxRetries+1 times, one that
//     kills its process MaxRetries+2 times. Then the message is dead.
//   - A slow handler keeps its message for as long as its process lives. When a
//     process dies, another takes over within 4/3 ClaimMinIdle + 2
//     ClaimInterval.
//   - An entry that is no message stops nothing: it goes to OnBroken.
//   - With MaxConcurrency 1 a subscription delivers in the stream's order, a
//     nacked message before its successors. What is taken over comes when it is
//     taken over.
//   - Close, and the end of Subscribe's context, drain: handlers finish, acks
//     arrive, the rest is released for others at once. That counts for no
//     delivery, and a handler that fails because of it has not failed.
//   - Dead-lettering is one step, and happens once.
//   - Subscriptions recover when Redis restarts, fails over, is flushed, loses the
//     group or refuses commands, and Stats shows the outage.
//   - The client stays the caller's, and so does the process.
//
// Without a ConsumerGroup a subscription is a fan-out: it gets every message
// that is published after Subscribe returned. Redis remembers for a minute how far
// it has read, for the sake of consumers with DeleteAcked, and nothing else.
//
// # The states of an entry
//
//	           read                 handed out              ack
//	stream ------------> queued --------------> out -------------> acked
//	   ^                    |                  |  | nack
//	   |                    | close      close |  +-----> waiting --+
//	   |                    v                  v     (its delay)    |
//	   |                 released <------------+<-------- close ----+
//	   |                    |                             |
//	   |   claim, by any    |                   due: claimed by itself,
//	   +--- other consumer -+                   delivery count + 1 -> out
//	        (or when the holder is dead)
//
// From out and waiting an entry also goes to the dead-letter stream: when its
// retries are used up, when its error says so, or when it could not be
// unmarshaled. All states but the first and the last are pending in Redis, with a
// lease that is renewed every third of ClaimMinIdle (but for released ones, which
// nobody holds).
//
// # The way of the data
//
//	Publish:    Marshaler -> MULTI XADD.. EXEC -> result
//	Consume:    poller (XREADGROUP) -> unmarshal -> output channel -> Ack | Nack
//	Acked:      what has gathered while the last XACK was under way
//	Nacked:     waits, ID and due time only -> one script: still ours? then XCLAIM
//	Abandoned:  XPENDING IDLE -> seen twice -> one script: untouched? then XCLAIM
//	Alive:      one script: still ours? then XCLAIM .. JUSTID
//	Released:   one script: still ours? then XCLAIM .. to the consumer named "released"
//	Dead:       one script: still ours? then XADD and XACK
//
// How it works inside, and which file does what, is in ARCHITECTURE.md.
package goxstreams

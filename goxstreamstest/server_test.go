package goxstreamstest_test

import (
	"bytes"
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/redis/go-redis/v9"

	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/goxstreamstest"
)

// subscribe subscribes to "orders"; the test's cleanup closes it.
func subscribe(t *testing.T, client redis.UniversalClient, config goxstreams.SubscriberConfig) <-chan *message.Message {
	t.Helper()
	config.Client, config.ConsumerGroup = client, "billing"
	subscriber, err := goxstreams.NewSubscriber(config, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = subscriber.Close() })
	messages, err := subscriber.Subscribe(context.Background(), "orders")
	if err != nil {
		t.Fatal(err)
	}
	return messages
}

func publish(t *testing.T, client redis.UniversalClient, payload []byte) {
	t.Helper()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := publisher.Publish("orders", message.NewMessage("1", payload)); err != nil {
		t.Fatal(err)
	}
}

// Clients in memory and by the network see the same server, large values included, and
// another server is another one.
func TestServer_Clients(t *testing.T) {
	t.Parallel()
	server := goxstreamstest.NewServer(t)
	addr := server.Addr()
	client := redis.NewClient(&redis.Options{Addr: addr})
	defer client.Close()
	if again := server.Addr(); again != addr {
		t.Errorf("the address was %s, and is %s", addr, again)
	}
	large := bytes.Repeat([]byte("x"), 4<<20)
	messages := subscribe(t, client, goxstreams.SubscriberConfig{})
	publish(t, server.Client(), large)
	msg := <-messages
	if !bytes.Equal(msg.Payload, large) {
		t.Errorf("%d bytes", len(msg.Payload))
	}
	msg.Ack()
	if n := goxstreamstest.NewServer(t).Client().DBSize(context.Background()).Val(); n != 0 {
		t.Errorf("another server has %d keys", n)
	}
}

// A read that waits does not hold up Close, whatever BlockTime is.
func TestServer_CloseIsQuick(t *testing.T) {
	t.Parallel()
	const closes = 5
	client := goxstreamstest.NewServer(t).Client()
	start := time.Now()
	for range closes {
		subscriber, err := goxstreams.NewSubscriber(goxstreams.SubscriberConfig{Client: client, ConsumerGroup: "g"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := subscriber.Subscribe(context.Background(), "orders"); err != nil {
			t.Fatal(err)
		}
		if err := subscriber.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(start) / closes; took > 500*time.Millisecond {
		t.Errorf("a Close takes %v", took) // without shortenBlock: a second
	}
}

// Reads that name no BLOCK, or wait for less, or forever, are left alone.
func TestServer_OtherReads(t *testing.T) {
	t.Parallel()
	client := goxstreamstest.NewServer(t).Client()
	ctx := context.Background()
	read := func(block time.Duration) error {
		return client.XRead(ctx, &redis.XReadArgs{Streams: []string{"block", "$"}, Block: block}).Err()
	}
	if err := read(-1); err != redis.Nil {
		t.Error(err)
	}
	if err := read(time.Millisecond); err != redis.Nil {
		t.Error(err)
	}
	forever := make(chan error, 1)
	go func() { forever <- read(0) }()
	select {
	case err := <-forever:
		t.Errorf("BLOCK 0 has ended: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	for { // until the reader has begun
		if err := client.XAdd(ctx, &redis.XAddArgs{Stream: "block", Values: []string{"a", "b"}}).Err(); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-forever:
			if err != nil {
				t.Error(err)
			}
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// In a bubble of virtual time nothing waits for retries.
func TestServer_VirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := goxstreamstest.NewServer(t).Client()
		messages := subscribe(t, client, goxstreams.SubscriberConfig{
			Retry: &goxstreams.Retry{MaxRetries: 2, InitialInterval: time.Minute, MaxInterval: time.Hour, Multiplier: 10},
		})
		publish(t, client, []byte("1 kettle"))
		start := time.Now()
		for _, want := range []time.Duration{0, time.Minute, 11 * time.Minute} {
			msg := <-messages
			if took := time.Since(start).Round(time.Second); took != want {
				t.Errorf("delivered after %v, want %v", took, want)
			}
			msg.Nack()
		}
		queue, err := goxstreams.NewDeadLetterQueue(client, goxstreams.DeadLetterTopic("orders"))
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		time.Sleep(time.Second)
		if n, err := queue.Count(context.Background()); n != 1 || err != nil {
			t.Errorf("%d dead letters, %v", n, err)
		}
	})
}

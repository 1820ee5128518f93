package main

import (
	"context"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	goxstreams "github.com/goxstreams/watermill-goxstreams"
	"github.com/goxstreams/watermill-goxstreams/goxstreamstest"
)

// A message whose handler runs when the shutdown begins is finished and acked.
func TestRun_Drains(t *testing.T) {
	client := goxstreamstest.NewServer(t).Client()
	publisher, err := goxstreams.NewPublisher(goxstreams.PublisherConfig{Client: client}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := publisher.Publish("orders", message.NewMessage("4711", []byte("1 kettle"))); err != nil {
		t.Fatal(err)
	}

	ctx, shutdown := context.WithCancel(context.Background())
	finished := false
	err = run(ctx, client, func(msg *message.Message) error {
		shutdown() // what SIGTERM does
		time.Sleep(100 * time.Millisecond)
		finished = msg.Context().Err() == nil
		return nil
	})
	if err != nil || !finished {
		t.Fatalf("run returned %v, handler finished: %v", err, finished)
	}
	pending, err := client.XPending(context.Background(), "orders", "billing").Result()
	if err != nil || pending.Count != 0 {
		t.Fatalf("%d pending, %v", pending.Count, err)
	}
}

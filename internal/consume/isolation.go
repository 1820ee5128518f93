package consume

import (
	"context"
	"reflect"
	"sync"
	"time"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// A message that may crash its process runs beside no other such message of its
// subscription: see ledger. A crash does not stop there, so these also take turns with
// those of the process's other subscriptions, as far as these have the same client.

// isolation is what the subscriptions of a client share.
type isolation struct {
	client redisx.Client
	turn   chan struct{} // capacity 1: it is somebody's turn
	users  int           // guarded by isolations
}

var isolations = struct {
	sync.Mutex
	of map[redisx.Client]*isolation
}{of: make(map[redisx.Client]*isolation)}

func joinIsolation(client redisx.Client) *isolation {
	if !reflect.ValueOf(client).Comparable() { // wrapped by a type with a slice, for example
		client = redisx.Client{}
	}
	isolations.Lock()
	defer isolations.Unlock()
	i := isolations.of[client]
	if i == nil {
		i = &isolation{client: client, turn: make(chan struct{}, 1)}
		isolations.of[client] = i
	}
	i.users++
	return i
}

func (i *isolation) leave() {
	isolations.Lock()
	defer isolations.Unlock()
	if i.users--; i.users == 0 {
		delete(isolations.of, i.client)
	}
}

// awaitTurn waits until it is this subscription's turn, and tells the ledger. Others wait no longer than
// twice the ledger's patience for its end, since handlers may take very long.
func (s *Subscription) awaitTurn() {
	turn := s.apart.turn
	select {
	case turn <- struct{}{}:
	case <-s.life.closing.Done():
		return
	}
	ctx, end := context.WithTimeout(context.Background(), 2*s.cfg.patience())
	context.AfterFunc(ctx, func() { <-turn })
	s.apply(s.ledger.HaveTurn(time.Now(), end))
}

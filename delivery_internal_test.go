package goxstreams

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
)

type valueKey struct{}

// The context of a message behaves like one of package context, whether somebody asks
// for its end before or after it ends.
func TestDeliveryContext(t *testing.T) {
	t.Parallel()
	base := context.WithValue(t.Context(), valueKey{}, "value")
	create := func() *deliveryContext { return &deliveryContext{Context: context.WithoutCancel(base)} }
	isDone := func(ctx context.Context) bool {
		select {
		case <-ctx.Done():
			return true
		default:
			return false
		}
	}

	for how, finish := range map[string]struct {
		end   func(*deliveryContext)
		cause error
	}{
		"settled":   {(*deliveryContext).end, context.Canceled},
		"lost":      {func(d *deliveryContext) { d.cancelable().cancel(ErrLeaseLost) }, ErrLeaseLost},
		"lost late": {func(d *deliveryContext) { d.end(); d.cancelable().cancel(ErrLeaseLost) }, context.Canceled},
	} {
		for _, asked := range []bool{true, false} {
			t.Run(fmt.Sprint(how, " asked ", asked), func(t *testing.T) {
				d := create()
				require.NoError(t, d.Err())
				require.NoError(t, context.Cause(d))
				child, called := context.Context(d), make(chan struct{})
				derive := func() {
					c, cancel := context.WithTimeout(d, time.Hour)
					t.Cleanup(cancel)
					child = c
					context.AfterFunc(c, func() { close(called) })
				}
				if asked {
					derive()
					require.False(t, isDone(d))
					require.False(t, isDone(child))
				}
				finish.end(d)
				if !asked {
					derive()
				}
				for _, ctx := range []context.Context{d, child} {
					require.True(t, isDone(ctx))
					require.ErrorIs(t, ctx.Err(), context.Canceled)
					require.ErrorIs(t, context.Cause(ctx), finish.cause)
					require.Equal(t, "value", ctx.Value(valueKey{}))
					require.Same(t, d, ctx.Value(deliveryKey{}))
				}
				<-called
				require.Equal(t, "value", context.WithoutCancel(child).Value(valueKey{}))
			})
		}
	}

	t.Run("all at once", func(t *testing.T) {
		for range 100 {
			d := create()
			var all sync.WaitGroup
			for range 4 {
				all.Go(func() { <-d.Done() })
			}
			all.Go(func() { d.cancelable().cancel(ErrLeaseLost) })
			all.Go(d.end)
			all.Wait()
			require.ErrorIs(t, d.Err(), context.Canceled)
		}
	})

	t.Run("printed", func(t *testing.T) {
		d := create()
		d.msg = message.NewMessage("uuid", []byte("secret"))
		d.msg.SetContext(d)
		child, cancel := context.WithCancel(d)
		defer cancel()
		for _, verb := range []string{"%v", "%+v", "%s"} {
			require.Equal(t, "goxstreams.Delivery", fmt.Sprintf(verb, d))
			require.Equal(t, "goxstreams.Delivery.WithCancel", fmt.Sprintf(verb, child))
		}
	})
}

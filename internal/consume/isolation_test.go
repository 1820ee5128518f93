package consume

import (
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
)

// Subscriptions of a client share an isolation as long as there are any; a client need not be
// comparable.
func TestIsolation(t *testing.T) {
	client, other := redis.NewClient(&redis.Options{}), redis.NewClient(&redis.Options{})
	defer client.Close()
	defer other.Close()
	odd := struct {
		redis.UniversalClient
		_ []string
	}{UniversalClient: client}
	a, b, c, d := joinIsolation(redisx.Client{UniversalClient: client}), joinIsolation(redisx.Client{UniversalClient: client}),
		joinIsolation(redisx.Client{UniversalClient: other}), joinIsolation(redisx.Client{UniversalClient: odd})
	require.Same(t, a, b)
	require.NotSame(t, a, c)
	require.NotSame(t, a, d)
	a.leave()
	require.Same(t, b, joinIsolation(redisx.Client{UniversalClient: client}))
	for _, i := range []*isolation{b, b, c, d} {
		i.leave()
	}
	isolations.Lock()
	defer isolations.Unlock()
	require.NotContains(t, isolations.of, a.client)
	require.NotContains(t, isolations.of, c.client)
}

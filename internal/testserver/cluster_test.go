package testserver

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// mustCluster starts a Cluster of servers of that kind, or skips as mustStart does.
func mustCluster(t *testing.T, kind string) *ClusterServer {
	t.Helper()
	mustStart(t, kind)
	began := time.Now()
	c, err := startCluster(func(args ...string) (*Server, error) { return backends[kind](args) })
	require.NoError(t, err)
	t.Logf("%s after %s", c, time.Since(began))
	t.Cleanup(func() { assert.NoError(t, c.close()) })
	return &ClusterServer{c, t}
}

func TestClusterLife(t *testing.T) {
	for kind := range backends {
		t.Run(kind, func(t *testing.T) {
			c := mustCluster(t, kind)
			client := c.Client()
			masters := map[string]bool{}
			for _, key := range []string{"a", "b", "c"} { // slots 15495, 3300, 7365: one in each third
				require.NoError(t, client.Set(t.Context(), key, key, 0).Err())
				masters[masterOf(t, client, key)] = true
			}
			assert.Len(t, masters, clusterMasters)

			from := masterOf(t, client, "a")
			asked := false
			c.MoveSlot("a", func() {
				require.NoError(t, client.Set(t.Context(), "new{a}", "", 0).Err())
				node := redis.NewClient(&redis.Options{Addr: from})
				defer node.Close()
				_, asked = redis.IsAskError(node.Get(t.Context(), "a").Err())
			})
			assert.True(t, asked, "halfway clients are not told ASK")
			assert.Equal(t, "a", client.Get(t.Context(), "a").Val())
			assert.EqualValues(t, 2, client.Exists(t.Context(), "a", "new{a}").Val())
			to := masterOf(t, c.Client(), "a")
			assert.NotEqual(t, from, to)
			assert.Contains(t, masters, to)

			require.NoError(t, c.close())
			for addr := range masters {
				require.Error(t, ping(addr))
			}
		})
	}
}

func masterOf(t *testing.T, client *redis.ClusterClient, key string) string {
	t.Helper()
	master, err := client.MasterForKey(t.Context(), key)
	require.NoError(t, err)
	return master.Options().Addr
}

// If not all servers of a Cluster start, none of them is left behind.
func TestClusterStartFails(t *testing.T) {
	mustStart(t, "process")
	var calls atomic.Int32
	started := make(chan *Server, clusterMasters)
	c, err := startCluster(func(args ...string) (*Server, error) {
		if calls.Add(1) == clusterMasters {
			return nil, errors.New("no third one")
		}
		srv, err := startProcess(args...)
		started <- srv
		return srv, err
	})
	require.Nil(t, c)
	require.ErrorContains(t, err, "no third one")
	close(started)
	for srv := range started {
		require.Error(t, ping(srv.Addr()))
	}
}

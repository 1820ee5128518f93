package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
)

// startServers starts a Cluster of three masters, if it can, or an embedded
// server, which says that it is a Cluster of one node. stop ends them.
func startServers(ctx context.Context) (addrs []string, stop func(), err error) {
	const masters = 3
	redisServer, err := exec.LookPath("redis-server")
	if err != nil {
		server, err := miniredis.Run()
		if err != nil {
			return nil, nil, err
		}
		fmt.Println("No redis-server in the PATH: on an embedded server, with one shard. REDIS_ADDRS names a Cluster.")
		return []string{server.Addr()}, server.Close, nil
	}
	fmt.Printf("On a Redis Cluster of its own, %d masters. REDIS_ADDRS names another one.\n", masters)
	dir, err := os.MkdirTemp("", "cluster-example-")
	if err != nil {
		return nil, nil, err
	}
	var nodes []*exec.Cmd
	stop = func() {
		for _, node := range nodes {
			_ = node.Process.Kill()
			_ = node.Wait()
		}
		_ = os.RemoveAll(dir)
	}
	ports, err := freePorts(2 * masters) // of each node one for clients, one for the other nodes
	for i := 0; i < masters && err == nil; i++ {
		home := filepath.Join(dir, strconv.Itoa(i))
		if err = os.Mkdir(home, 0o700); err != nil {
			break
		}
		node := exec.Command(redisServer, "--bind", "127.0.0.1", "--port", ports[i], "--cluster-port", ports[masters+i],
			"--cluster-enabled", "yes", "--dir", home, "--save", "", "--appendonly", "no", "--logfile", "log")
		if err = node.Start(); err == nil {
			nodes = append(nodes, node)
			addrs = append(addrs, "127.0.0.1:"+ports[i])
		}
	}
	if err == nil {
		err = join(ctx, addrs, ports[masters:])
	}
	if err != nil {
		stop()
		return nil, nil, err
	}
	return addrs, stop, nil
}

// join makes a Cluster of empty nodes, and returns when each of them says that it is one.
func join(ctx context.Context, addrs, clusterPorts []string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	const slots = 16384
	nodes := make([]*redis.Client, len(addrs))
	for i, addr := range addrs {
		node := redis.NewClient(&redis.Options{Addr: addr})
		defer node.Close()
		nodes[i] = node
		for node.Ping(ctx).Err() != nil && ctx.Err() == nil { // until it listens
			time.Sleep(20 * time.Millisecond)
		}
		if err := node.ClusterAddSlotsRange(ctx, i*slots/len(addrs), (i+1)*slots/len(addrs)-1).Err(); err != nil {
			return err
		}
		if i > 0 { // go-redis's ClusterMeet cannot name the port of the other nodes
			if err := node.Do(ctx, "cluster", "meet", "127.0.0.1", addrs[0][len("127.0.0.1:"):], clusterPorts[0]).Err(); err != nil {
				return err
			}
		}
	}
	for _, node := range nodes {
		for {
			info := node.ClusterInfo(ctx).Val()
			if strings.Contains(info, "cluster_state:ok") && strings.Contains(info, fmt.Sprintf("cluster_size:%d", len(addrs))) {
				break
			}
			if ctx.Err() != nil {
				return errors.New("the nodes do not become a Cluster: " + info)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return nil
}

// freePorts returns ports that nobody listens on at the moment.
func freePorts(n int) (ports []string, err error) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		ports = append(ports, strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	}
	return ports, nil
}

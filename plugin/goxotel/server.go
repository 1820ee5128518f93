package goxotel

import (
	"net"
	"strconv"

	"github.com/redis/go-redis/v9"
	"go.opentelemetry.io/otel/attribute"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
)

// serverOf returns the attributes server.address and server.port of a client; none if
// it is not known to have one server.
func serverOf(client redis.UniversalClient) []attribute.KeyValue {
	var addr string
	switch c := client.(type) {
	case *redis.Client:
		if c == nil {
			return nil
		}
		if addr = c.Options().Addr; c.Options().Network == "unix" {
			return []attribute.KeyValue{semconv.ServerAddress(addr)}
		}
	case *redis.ClusterClient:
		if c == nil || len(c.Options().Addrs) != 1 {
			return nil
		}
		addr = c.Options().Addrs[0]
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil || host == "" {
		return nil // a Sentinel's client has no address in its options
	}
	attributes := []attribute.KeyValue{semconv.ServerAddress(host)}
	if n, err := strconv.Atoi(port); err == nil {
		attributes = append(attributes, semconv.ServerPort(n))
	}
	return attributes
}

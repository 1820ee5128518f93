package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/stream"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/rs/zerolog"
)

// A Network has a proxy from each process to each server, so that one process can be cut off as well as all.
type Network struct {
	server *toxiproxy.ApiServer // only what proxies need of it: it does not listen
	lanes  map[string][]*toxiproxy.Proxy
}

func newNetwork() *Network {
	return &Network{
		server: toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop()),
		lanes:  make(map[string][]*toxiproxy.Proxy),
	}
}

// routes makes the process's proxies and returns where it reaches each server.
func (n *Network) routes(process string, servers []string) (map[string]string, error) {
	routes := make(map[string]string)
	for _, server := range servers {
		proxy, err := n.proxy(process, server)
		if err != nil {
			return nil, fmt.Errorf("proxy from %s to %s: %w", process, server, err)
		}
		n.lanes[process] = append(n.lanes[process], proxy)
		routes[server] = proxy.Listen
	}
	return routes, nil
}

// The proxies' ports are below those that the kernel gives to clients.
const (
	firstProxyPort = 31000
	proxyPorts     = 1000
)

func (n *Network) proxy(process, server string) (*toxiproxy.Proxy, error) {
	for range 10 * proxyPorts {
		listen := fmt.Sprintf("127.0.0.1:%d", firstProxyPort+rand.IntN(proxyPorts))
		proxy := toxiproxy.NewProxy(n.server, process+"-"+server, listen, server)
		err := proxy.Start()
		if err == nil || !errors.Is(err, syscall.EADDRINUSE) {
			return proxy, err
		}
	}
	return nil, errors.New("no port is free")
}

func (n *Network) close() {
	for _, proxies := range n.lanes {
		for _, proxy := range proxies {
			proxy.Stop()
		}
	}
}

// A toxic is what a proxy does to the data, in toxiproxy's JSON.
type toxic struct {
	Name       string         `json:"name"`
	Type       string         `json:"type"`
	Stream     string         `json:"stream"`
	Toxicity   float32        `json:"toxicity"`
	Attributes map[string]any `json:"attributes"`
}

// poison adds the toxics to the processes' proxies.
func (n *Network) poison(processes []string, all ...toxic) error {
	var errs []error
	for _, process := range processes {
		for _, proxy := range n.lanes[process] {
			for _, t := range all {
				text, err := json.Marshal(t)
				if err == nil {
					_, err = proxy.Toxics.AddToxicJson(strings.NewReader(string(text)))
				}
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// cure puts new proxies in the place of the processes' old ones: to take toxics off connections that are stuck may take for ever,
// and in those connections data are missing anyway.
func (n *Network) cure(processes []string) error {
	var errs []error
	for _, process := range processes {
		for i, old := range n.lanes[process] {
			old.Stop()
			proxy := toxiproxy.NewProxy(n.server, old.Name, old.Listen, old.Upstream)
			errs = append(errs, proxy.Start())
			n.lanes[process][i] = proxy
		}
	}
	return errors.Join(errs...)
}

// Where a reply is cut off.
const (
	beforeReply = "before"
	inMidReply  = "middle"
	afterReply  = "after"
)

const cutType = "goxstreams_cut"

// A cutToxic closes connections at some of the replies: the request has been carried out.
type cutToxic struct {
	Place string  `json:"place"`
	Rate  float64 `json:"rate"` // the part of the replies
}

func init() { toxics.Register(cutType, new(cutToxic)) }

// Pipe passes replies on until it cuts one off.
func (t *cutToxic) Pipe(stub *toxics.ToxicStub) {
	for {
		select {
		case <-stub.Interrupt:
			return
		case reply := <-stub.Input:
			if reply == nil {
				stub.Close()
				return
			}
			if rand.Float64() >= t.Rate {
				stub.Output <- reply
				continue
			}
			if rest := t.rest(reply.Data); len(rest) > 0 {
				stub.Output <- &stream.StreamChunk{Data: rest, Timestamp: reply.Timestamp}
			}
			stub.Close()
			for reply != nil { // or who writes to us would wait for ever
				reply = <-stub.Input
			}
			return
		}
	}
}

// rest is what the client gets of the reply.
func (t *cutToxic) rest(reply []byte) []byte {
	switch t.Place {
	case beforeReply:
		return nil
	case inMidReply:
		return reply[:len(reply)/2]
	}
	return reply
}

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/stream"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/rs/zerolog"

	"github.com/goxstreams/watermill-goxstreams/internal/chaos/deploy"
)

// A Network has a proxy from each process to each server, so that one process can be cut off as well as all.
type Network struct {
	server *toxiproxy.ApiServer // proxies need one; it does not listen

	mu     sync.Mutex
	lanes  map[string][]*toxiproxy.Proxy // by process
	toxics map[string][]toxic            // in force, by process
	claims []io.Closer                   // of the proxies' ports
}

func newNetwork() *Network {
	return &Network{
		server: toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop()),
		lanes:  make(map[string][]*toxiproxy.Proxy),
		toxics: make(map[string][]toxic),
	}
}

// routes makes the process's proxies, and returns their addresses by server.
func (n *Network) routes(process string, servers []string) (map[string]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	routes := make(map[string]string)
	for _, server := range servers {
		proxy, err := n.proxyLocked(process, server)
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
	firstProxyPort = 30000
	proxyPorts     = 1000
)

// proxyLocked claims the proxy's port, because cure does not listen on it for a moment.
func (n *Network) proxyLocked(process, server string) (*toxiproxy.Proxy, error) {
	for {
		port, claim, err := deploy.ReservePort(firstProxyPort, proxyPorts, 0)
		if err != nil {
			return nil, err
		}
		n.claims = append(n.claims, claim)
		proxy := toxiproxy.NewProxy(n.server, process+"-"+server, fmt.Sprintf("127.0.0.1:%d", port), server)
		// A program that knows nothing of claims uses it. Keep the claim, so that the next try gets another port.
		if err := proxy.Start(); !errors.Is(err, syscall.EADDRINUSE) {
			return proxy, err
		}
	}
}

func (n *Network) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	defer func() {
		for _, claim := range n.claims {
			claim.Close()
		}
	}()
	for _, proxies := range n.lanes {
		for _, proxy := range proxies {
			proxy.Stop()
		}
	}
}

// A toxic is what a proxy does to the data, as toxiproxy's JSON.
type toxic struct {
	strike     int            // whose it is
	Name       string         `json:"name"`
	Type       string         `json:"type"`
	Stream     string         `json:"stream"`
	Toxicity   float32        `json:"toxicity"`
	Attributes map[string]any `json:"attributes"`
}

// poison adds the strike's toxics to the processes' proxies.
func (n *Network) poison(s Strike, processes []string, all ...toxic) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := range all {
		all[i].strike, all[i].Name = s.Number, fmt.Sprintf("%s-%d", all[i].Name, s.Number)
	}
	var errs []error
	for _, process := range processes {
		n.toxics[process] = append(n.toxics[process], all...)
		for _, proxy := range n.lanes[process] {
			errs = append(errs, addToxics(proxy, all))
		}
	}
	return errors.Join(errs...)
}

func addToxics(proxy *toxiproxy.Proxy, all []toxic) error {
	var errs []error
	for _, t := range all {
		text, err := json.Marshal(t)
		if err == nil {
			_, err = proxy.Toxics.AddToxicJson(strings.NewReader(string(text)))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// cure removes the strike's toxics. It replaces the processes' proxies by new ones, which have the toxics of other strikes: to
// remove toxics from stuck connections may take forever, and data are missing in those anyway.
func (n *Network) cure(s Strike, processes []string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for _, process := range processes {
		n.toxics[process] = slices.DeleteFunc(n.toxics[process], func(t toxic) bool { return t.strike == s.Number })
		for i, old := range n.lanes[process] {
			old.Stop()
			proxy := toxiproxy.NewProxy(n.server, old.Name, old.Listen, old.Upstream)
			errs = append(errs, addToxics(proxy, n.toxics[process]), startAgain(proxy))
			n.lanes[process][i] = proxy
		}
	}
	return errors.Join(errs...)
}

// startAgain starts a proxy at the port of one that has stopped. It waits for children that have been forked and do not run
// their program yet: until then they have the socket too.
func startAgain(proxy *toxiproxy.Proxy) error {
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		err := proxy.Start()
		if !errors.Is(err, syscall.EADDRINUSE) || time.Since(began) > clientTimeout*10 {
			return err
		}
	}
}

// Where a reply is cut off.
const (
	beforeReply = "before"
	inMidReply  = "middle"
	afterReply  = "after"
)

const cutType = "goxstreams_cut"

// A cutToxic closes connections at some of the replies, after the command has run.
type cutToxic struct {
	Place string  `json:"place"`
	Rate  float64 `json:"rate"` // the fraction of replies
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
			for reply != nil { // or the writer would wait forever
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

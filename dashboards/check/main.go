// Check makes the Grafana dashboard for goxotel's metrics from the one for goxprom's. Its
// tests check both, and the alert rules, with Grafana's schema and Prometheus's promtool.
//
//	go run .
package main

import (
	"fmt"
	"os"
)

const (
	promDashboard = "../goxstreams.json"
	otelDashboard = "../goxstreams-otel.json"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "check:", err)
		os.Exit(1)
	}
}

func run() error {
	dashboard, err := os.ReadFile(promDashboard)
	if err != nil {
		return err
	}
	return os.WriteFile(otelDashboard, []byte(forOTel(string(dashboard))), 0o644)
}

// Render draws a Grafana dashboard without Grafana: each panel's own expressions,
// as a Prometheus answers them, in the dashboard's layout, as a PNG.
//
//	go run . -prometheus http://localhost:9090 -minutes 10
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"time"
)

func main() {
	file := flag.String("dashboard", "../goxstreams.json", "the dashboard")
	out := flag.String("out", "../goxstreams.png", "the picture")
	url := flag.String("prometheus", "http://localhost:9090", "the Prometheus server")
	end := flag.Int64("end", time.Now().Unix(), "the end of what is drawn, in seconds since 1970")
	minutes := flag.Int("minutes", 10, "how much time is drawn")
	step := flag.Duration("step", 5*time.Second, "the resolution: at which that server scrapes")
	resolution := flag.Int("dpi", dpi, "the picture's resolution; twice as much for a sharp screen")
	flag.Parse()
	p := prometheus{*url, time.Unix(*end, 0).Add(-time.Duration(*minutes) * time.Minute), time.Unix(*end, 0), *step}
	if err := render(context.Background(), p, *file, *out, *resolution); err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}

func render(ctx context.Context, p prometheus, file, out string, resolution int) error {
	d, err := readDashboard(file)
	if err != nil {
		return err
	}
	data := make([][]series, len(d.Panels))
	for i, panel := range d.Panels {
		if data[i], err = p.query(ctx, d, panel); err != nil {
			return fmt.Errorf("%s: %w", panel.Title, err)
		}
	}
	return p.write(out, resolution, d, data)
}

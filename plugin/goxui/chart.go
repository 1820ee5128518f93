package goxui

import (
	"fmt"
	"strings"
)

// chart is a line of rates, as an SVG image.
type chart struct {
	What       string
	Lines      []string // the points of each: where a rate is not known, there is a gap
	Last, Most float32  // -1: not known
}

// The coordinates within a chart.
const chartWidth, chartHeight = 120, 24

// newChart returns the chart of some rates.
func newChart(what string, points []float32) chart {
	c := chart{What: what, Last: -1}
	for _, v := range points {
		c.Most = max(c.Most, v)
	}
	if len(points) > 0 {
		c.Last = points[len(points)-1]
	}
	var line []string
	end := func() {
		if len(line) > 1 {
			c.Lines = append(c.Lines, strings.Join(line, " "))
		}
		line = nil
	}
	for i, v := range points {
		if v < 0 {
			end()
			continue
		}
		x := float32(chartWidth) - float32(len(points)-1-i)*chartWidth/(maxPoints-1)
		y := chartHeight - 1 - (chartHeight-2)*v/max(c.Most, 1e-9)
		line = append(line, fmt.Sprintf("%.1f,%.1f", x, y))
	}
	end()
	return c
}

package main

import (
	"errors"
	"fmt"
	"image/color"
	"math"
	"os"
	"strconv"
	"time"

	xfont "golang.org/x/image/font"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
)

// Lengths in pixels: those of Grafana's grid at a width of 1600.
const (
	dpi       = 96 // of these pixels
	columns   = 24
	cell      = 66 // a column
	row       = 38
	gap       = 8
	header    = 64
	pageWidth = columns*cell + gap
)

func px(n float64) vg.Length { return vg.Length(n) * vg.Inch / dpi }

var (
	page    = color.RGBA{0xf4, 0xf5, 0xf5, 0xff}
	border  = color.RGBA{0xdd, 0xde, 0xe0, 0xff}
	grid    = color.RGBA{0xe3, 0xe4, 0xe7, 0xff}
	dark    = color.RGBA{0x24, 0x29, 0x2e, 0xff}
	muted   = color.RGBA{0x6a, 0x71, 0x78, 0xff}
	palette = []color.RGBA{ // the beginning of Grafana's palette-classic, for a light theme
		{0x56, 0xa6, 0x4b, 0xff}, {0xe0, 0xa8, 0x00, 0xff}, {0x32, 0x74, 0xd9, 0xff}, {0xfa, 0x64, 0x00, 0xff},
		{0xe0, 0x2f, 0x44, 0xff}, {0x8f, 0x3b, 0xb8, 0xff},
	}
	named = map[string]color.RGBA{
		"green": {0x56, 0xa6, 0x4b, 0xff}, "orange": {0xf2, 0x7d, 0x1e, 0xff}, "red": {0xe0, 0x2f, 0x44, 0xff},
	}
)

func style(size float64, bold bool, c color.Color) text.Style {
	f := font.Font{Typeface: "Liberation", Variant: "Sans", Size: px(size)}
	if bold {
		f.Weight = xfont.WeightBold
	}
	return text.Style{Color: c, Font: f, Handler: plot.DefaultTextHandler}
}

// drawing is the picture of a dashboard.
type drawing struct {
	prometheus
	canvas draw.Canvas
	height float64
}

// write writes the dashboard as a PNG; data are of the panels, in their order. The
// resolution is in dots per inch.
func (p prometheus) write(file string, resolution int, d dashboard, data [][]series) error {
	rows := 0
	for _, panel := range d.Panels {
		rows = max(rows, panel.GridPos.Y+panel.GridPos.H)
	}
	height := float64(header + rows*row + gap)
	image := vgimg.NewWith(vgimg.UseWH(px(pageWidth), px(height)), vgimg.UseDPI(resolution))
	g := drawing{p, draw.New(image), height}
	g.fill(g.canvas.Rectangle, page)
	at := func(x, y float64) vg.Point { return vg.Point{X: px(x), Y: px(height - y)} }
	g.canvas.FillText(style(22, true, dark), at(gap+4, 30), d.Title)
	g.canvas.FillText(style(13, false, muted), at(gap+4, 52), fmt.Sprintf(
		"%s to %s.  Drawn from the dashboard's JSON by dashboards/render, not by Grafana.",
		p.start.UTC().Format("15:04:05"), p.end.UTC().Format("15:04:05 UTC")))
	for i, panel := range d.Panels {
		if err := g.panel(panel, data[i]); err != nil {
			return fmt.Errorf("%s: %w", panel.Title, err)
		}
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = vgimg.PngCanvas{Canvas: image}.WriteTo(f)
	return errors.Join(err, f.Close())
}

func (g drawing) fill(r vg.Rectangle, c color.Color) {
	g.canvas.SetColor(c)
	g.canvas.Fill(r.Path())
}

// panel draws a panel in its place.
func (g drawing) panel(p panel, data []series) error {
	left, top := float64(gap+p.GridPos.X*cell), float64(header+p.GridPos.Y*row)
	right, bottom := left+float64(p.GridPos.W*cell-gap), top+float64(p.GridPos.H*row-gap)
	box := vg.Rectangle{
		Min: vg.Point{X: px(left), Y: px(g.height - bottom)},
		Max: vg.Point{X: px(right), Y: px(g.height - top)},
	}
	g.fill(box, color.White)
	inner := draw.Canvas{Canvas: g.canvas, Rectangle: box}
	var err error
	switch p.Type {
	case "stat":
		g.stat(inner, p, data)
	case "timeseries":
		err = g.timeseries(inner, p, data)
	default:
		err = fmt.Errorf("a panel of type %q is not known here", p.Type)
	}
	g.canvas.SetColor(border)
	g.canvas.SetLineWidth(px(1))
	g.canvas.Stroke(box.Path())
	return err
}

// stat draws the last value.
func (g drawing) stat(c draw.Canvas, p panel, data []series) {
	value, background := "No data", color.RGBA{0x9f, 0xa7, 0xb3, 0xff}
	if len(data) > 0 && len(data[0].points) > 0 {
		v := data[0].points[len(data[0].points)-1].v
		value = format(p.FieldConfig.Defaults.Unit, v)
		for _, m := range p.FieldConfig.Defaults.Mappings {
			if o, ok := m.Options[strconv.FormatFloat(v, 'f', -1, 64)]; ok {
				value = o.Text
			}
		}
		for _, step := range p.FieldConfig.Defaults.Thresholds.Steps {
			if step.Value == nil || v >= *step.Value {
				background = named[step.Color]
			}
		}
	}
	g.fill(c.Rectangle, background)
	title := style(14, true, color.White)
	c.FillText(title, vg.Point{X: c.Min.X + px(10), Y: c.Max.Y - px(22)}, p.Title)
	big := style(38, true, color.White)
	big.XAlign, big.YAlign = text.XCenter, text.YCenter
	c.FillText(big, vg.Point{X: (c.Min.X + c.Max.X) / 2, Y: (c.Min.Y+c.Max.Y)/2 - px(10)}, value)
}

// timeseries draws curves over time, with a legend below.
func (g drawing) timeseries(c draw.Canvas, p panel, data []series) error {
	c.FillText(style(14, true, dark), vg.Point{X: c.Min.X + px(10), Y: c.Max.Y - px(22)}, p.Title)
	legend := g.legend(c, data)

	plt := plot.New()
	plt.BackgroundColor = color.Transparent
	plt.X.Min, plt.X.Max = seconds(g.start), seconds(g.end)
	top := 0.0
	for _, s := range data {
		for _, point := range s.points {
			top = max(top, point.v)
		}
	}
	step := niceStep(top, p.FieldConfig.Defaults.Unit)
	plt.Y.Min, plt.Y.Max = 0, max(step, math.Ceil(top*1.02/step)*step)
	plt.Y.Tick.Marker = plot.TickerFunc(func(_, high float64) (ticks []plot.Tick) {
		for v := 0.0; v <= high+step/2; v += step {
			ticks = append(ticks, plot.Tick{Value: v, Label: format(p.FieldConfig.Defaults.Unit, v)})
		}
		return ticks
	})
	plt.X.Tick.Marker = plot.TickerFunc(func(low, high float64) (ticks []plot.Tick) {
		const minute = 60
		every := math.Ceil((high-low)/minute/8) * minute
		for v := math.Ceil(low/every) * every; v <= high; v += every {
			ticks = append(ticks, plot.Tick{Value: v, Label: time.Unix(int64(v), 0).UTC().Format("15:04")})
		}
		return ticks
	})
	for _, axis := range []*plot.Axis{&plt.X, &plt.Y} {
		axis.LineStyle.Width, axis.Tick.LineStyle.Width, axis.Tick.Length = 0, 0, px(3)
		axis.Padding = 0
		label := &axis.Tick.Label
		label.Font, label.Color = style(11, false, muted).Font, muted
	}
	lines := plotter.NewGrid()
	lines.Vertical.Color, lines.Horizontal.Color = grid, grid
	plt.Add(lines)
	// The first series are drawn last: what comes after them is often a part of
	// them.
	for i := len(data) - 1; i >= 0; i-- {
		for _, part := range g.parts(data[i].points) {
			line, err := plotter.NewLine(part)
			if err != nil {
				return err
			}
			line.Color, line.Width = palette[i%len(palette)], px(2)
			fill := palette[i%len(palette)]
			fill.R, fill.G, fill.B, fill.A = fill.R/12, fill.G/12, fill.B/12, 0xff/12
			line.FillColor = fill
			plt.Add(line)
		}
	}
	if len(data) == 0 {
		none := style(14, false, muted)
		none.XAlign = text.XCenter
		c.FillText(none, vg.Point{X: (c.Min.X + c.Max.X) / 2, Y: (c.Min.Y + c.Max.Y) / 2}, "No data")
	}
	plt.Draw(draw.Crop(c, px(8), -px(18), legend+px(4), -px(36)))
	return nil
}

// legend draws the names of the series and returns its height.
func (g drawing) legend(c draw.Canvas, data []series) vg.Length {
	const line = 17.0
	type item struct {
		x    vg.Length
		row  int
		name string
		c    color.Color
	}
	var items []item
	words := style(11.5, false, dark)
	x, at := px(12), 0
	for i, s := range data {
		width := px(20) + words.Width(s.name) + px(14)
		if x+width > c.Max.X-c.Min.X && x > px(12) {
			x, at = px(12), at+1
		}
		items = append(items, item{x, at, s.name, palette[i%len(palette)]})
		x += width
	}
	for _, i := range items {
		y := c.Min.Y + px(10+line*float64(at-i.row))
		g.fill(vg.Rectangle{Min: vg.Point{X: c.Min.X + i.x, Y: y + px(2)}, Max: vg.Point{X: c.Min.X + i.x + px(14), Y: y + px(5.5)}}, i.c)
		c.FillText(words, vg.Point{X: c.Min.X + i.x + px(19), Y: y}, i.name)
	}
	return px(10 + line*float64(at+1))
}

// parts splits a curve where points are missing: there nothing was measured.
func (g drawing) parts(points []point) (parts []plotter.XYs) {
	var before time.Time
	for _, p := range points {
		if math.IsNaN(p.v) {
			continue
		}
		if before.IsZero() || p.at.Sub(before) > g.step*3/2 {
			parts = append(parts, nil)
		}
		last := len(parts) - 1
		parts[last] = append(parts[last], plotter.XY{X: seconds(p.at), Y: p.v})
		before = p.at
	}
	return parts
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

// niceStep returns the distance of about four ticks below top.
func niceStep(top float64, unit string) float64 {
	if top <= 0 {
		return 1
	}
	raw := top / 4
	if unit == "s" && raw > 5 {
		for _, s := range []float64{10, 15, 30, 60, 120, 300, 600, 1800, 3600} {
			if raw <= s {
				return s
			}
		}
	}
	size := math.Pow(10, math.Floor(math.Log10(raw)))
	for _, digit := range []float64{1, 2, 5} {
		if raw <= digit*size {
			return digit * size
		}
	}
	return 10 * size
}

// format writes a value in one of the units of the dashboard, as Grafana does.
func format(unit string, v float64) string {
	number := func(v float64) string { return strconv.FormatFloat(math.Round(v*100)/100, 'f', -1, 64) }
	short := func(v float64) string {
		switch {
		case v >= 1e6:
			return number(v/1e6) + " M"
		case v >= 1e4:
			return number(v/1e3) + " K"
		}
		return number(v)
	}
	switch {
	case unit == "s" && v >= 60:
		return number(v/60) + " min"
	case unit == "s":
		return number(v) + " s"
	case unit == "cps":
		return short(v) + "/s"
	}
	return short(v)
}

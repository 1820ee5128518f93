package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
)

// A picture is one metric of a sweep.
type picture struct{ file, metric, title, xLabel, yLabel string }

// 900 x 550 pixels at the 96 dots per inch of plot's PNG.
const (
	pictureWidth  = 900 * vg.Inch / 96
	pictureHeight = 550 * vg.Inch / 96
)

// looks are a line's colour and the shape of its points, so that they can be told apart
// in black and white too.
var looks = map[string]struct {
	color color.Color
	shape draw.GlyphDrawer
}{
	"ours":        {color.RGBA{0x1f, 0x77, 0xb4, 0xff}, draw.CircleGlyph{}},
	"redisstream": {color.RGBA{0xd6, 0x27, 0x28, 0xff}, draw.BoxGlyph{}},
	"raw":         {color.RGBA{0x55, 0x55, 0x55, 0xff}, draw.PyramidGlyph{}},
}

// drawAll draws every picture of the data in the file.
func drawAll(file, dir string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var data growthData
	if err := json.Unmarshal(text, &data); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, s := range sweeps {
		for _, p := range s.pictures {
			if err := p.draw(&data, s, filepath.Join(dir, p.file+".png")); err != nil {
				return fmt.Errorf("%s: %w", p.file, err)
			}
		}
	}
	return nil
}

func (p picture) draw(data *growthData, s sweep, file string) error {
	canvas := p.canvas(data.Machine)
	canvas.X.Tick.Marker = xTicks(s.xs)
	var ys []float64
	for _, system := range s.systems {
		line := curve(data, s, p.metric, system)
		for _, xy := range line {
			ys = append(ys, xy.Y)
		}
		if err := addCurve(canvas, system, line); err != nil {
			return err
		}
	}
	if len(ys) == 0 {
		return errors.New("no data: measure without -draw")
	}
	low, high := slices.Min(ys), slices.Max(ys)
	room := max(0.3, 0.3*(high-low)) // above the curves, for the legend
	canvas.Y.Min, canvas.Y.Max = low-0.1, high+room
	left, right := position(s.xs, s.xs[0]), position(s.xs, s.xs[len(s.xs)-1])
	canvas.X.Min, canvas.X.Max = left, right+0.02*(right-left)
	return save(canvas, file)
}

// canvas returns a plot with its labels and style, but no data.
func (p picture) canvas(m machine) *plot.Plot {
	canvas := plot.New()
	sans := font.Font{Typeface: "Liberation", Variant: "Sans"}
	canvas.Title.Text, canvas.X.Label.Text, canvas.Y.Label.Text = p.title, p.xLabel+"\n"+m.String(), p.yLabel
	canvas.Title.Padding = vg.Points(8)
	canvas.Title.TextStyle.Font = font.From(sans, 14)
	canvas.Legend.TextStyle.Font = font.From(sans, 11)
	canvas.Legend.Padding, canvas.Legend.Top = vg.Points(3), true
	for _, axis := range []*plot.Axis{&canvas.X, &canvas.Y} {
		axis.Label.TextStyle.Font = font.From(sans, 11)
		axis.Tick.Label.Font = font.From(sans, 10)
		axis.Label.Padding = vg.Points(4)
	}
	canvas.Y.Tick.Marker = yTicks{}
	canvas.Add(plotter.NewGrid())
	return canvas
}

// save writes a PNG with a margin.
func save(canvas *plot.Plot, file string) error {
	image := vgimg.New(pictureWidth, pictureHeight)
	const margin = 10
	canvas.Draw(draw.Crop(draw.New(image), margin, -margin, margin, -margin))
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = vgimg.PngCanvas{Canvas: image}.WriteTo(f)
	return errors.Join(err, f.Close())
}

// curve returns the points of a system as they are drawn. Both axes are logarithmic,
// which is computed here so that there is a place for 0.
func curve(data *growthData, s sweep, metric, system string) plotter.XYs {
	var line plotter.XYs
	for _, p := range data.Points {
		if p.Sweep == s.name && p.Metric == metric && p.System == system && p.Y > 0 {
			line = append(line, plotter.XY{X: position(s.xs, p.X), Y: math.Log10(p.Y)})
		}
	}
	return line
}

// position returns where an x is drawn; 0 is a decade left of the next one.
func position(xs []int, x int) float64 {
	if x == 0 {
		return math.Log10(float64(xs[1])) - 1
	}
	return math.Log10(float64(x))
}

func addCurve(canvas *plot.Plot, system string, xys plotter.XYs) error {
	if len(xys) == 0 {
		return nil
	}
	line, points, err := plotter.NewLinePoints(xys)
	if err != nil {
		return err
	}
	look := looks[system]
	line.Color, points.Color = look.color, look.color
	line.Width, points.Radius, points.Shape = vg.Points(1.8), vg.Points(3.5), look.shape
	canvas.Add(line, points)
	name := map[string]string{"ours": "watermill-goxstreams", "redisstream": "watermill-redisstream", "raw": "go-redis by hand"}[system]
	canvas.Legend.Add(name, line, points)
	return nil
}

// xTicks are at the measured values.
func xTicks(xs []int) plot.ConstantTicks {
	var ticks plot.ConstantTicks
	for _, x := range xs {
		ticks = append(ticks, plot.Tick{Value: position(xs, x), Label: short(float64(x))})
	}
	return ticks
}

// yTicks are at 1, 2 and 5 of every decade.
type yTicks struct{}

func (yTicks) Ticks(low, high float64) []plot.Tick {
	var ticks []plot.Tick
	for decade := math.Floor(low); decade <= high; decade++ {
		for _, digit := range []float64{1, 2, 5} {
			v := digit * math.Pow(10, decade)
			if at := math.Log10(v); at >= low && at <= high {
				ticks = append(ticks, plot.Tick{Value: at, Label: short(v)})
			}
		}
	}
	return ticks
}

// short writes 10000 as 10k; powers of two as 4Ki.
func short(x float64) string {
	for _, unit := range []struct {
		size float64
		name string
	}{{1 << 20, "Mi"}, {1e6, "M"}, {1 << 10, "Ki"}, {1e3, "k"}} {
		if x >= unit.size && math.Mod(x, unit.size) == 0 {
			return strconv.FormatFloat(x/unit.size, 'f', -1, 64) + unit.name
		}
	}
	return strconv.FormatFloat(x, 'g', 3, 64)
}

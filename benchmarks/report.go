package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A measurement is the result of one trial.
type measurement struct {
	Scenario string  `json:"scenario"`
	System   string  `json:"system"`
	Round    int     `json:"round"` // 0 is the warm-up, which is not reported
	Metrics  metrics `json:"metrics"`
}

// A machine describes where the numbers were measured.
type machine struct {
	CPU   string `json:"cpu"`
	Cores int    `json:"cores"`
	Go    string `json:"go"`
	Redis string `json:"redis"`
	Date  string `json:"date"`
}

// results has everything that a run measured, as -json writes it.
type results struct {
	Machine      machine       `json:"machine"`
	Measurements []measurement `json:"measurements"`
}

func (e *env) machine() (machine, error) {
	fields, err := info(e.admin, "server")
	if err != nil {
		return machine{}, err
	}
	version := "Redis " + fields["redis_version"]
	if v := fields["valkey_version"]; v != "" {
		version = "Valkey " + v
	}
	return machine{cpuModel(), runtime.NumCPU(), runtime.Version(), version, time.Now().Format(time.DateOnly)}, nil
}

// cpuModel is empty where there is no /proc.
func cpuModel() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func (m machine) String() string {
	cpu := m.CPU
	if cpu == "" {
		cpu = "unknown CPU"
	}
	return fmt.Sprintf("%s, %d cores, %s, %s, %s", cpu, m.Cores, m.Go, m.Redis, m.Date)
}

func writeJSON(path string, v any) error {
	text, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// of returns a metric of a system in a scenario, by round. Rounds without it
// are missing.
func (r *results) of(s *scenario, system, metric string) map[int]float64 {
	values := make(map[int]float64)
	for _, m := range r.Measurements {
		if v, ok := m.Metrics[metric]; ok && m.Scenario == s.name && m.System == system && m.Round > 0 {
			values[m.Round] = v
		}
	}
	return values
}

// tables writes a table for each group of scenarios that was measured.
func (r *results) tables(w io.Writer) {
	var last *scenarioGroup
	for _, s := range scenarios {
		measured := slices.ContainsFunc(r.Measurements, func(m measurement) bool { return m.Scenario == s.name })
		if !measured {
			continue
		}
		if s.group != last {
			last = s.group
			s.group.heading(w)
		}
		r.rows(w, s)
	}
	fmt.Fprintf(w, "\n%s\n", r.Machine)
}

func (g *scenarioGroup) heading(w io.Writer) {
	fmt.Fprintf(w, "\n### %s\n\n%s\n\n| scenario | system |", g.name, g.note)
	for _, c := range g.columns {
		fmt.Fprintf(w, " %s |", c)
	}
	fmt.Fprintf(w, " ours / it (%s) |\n|---|---|%s--:|\n", g.ratio, strings.Repeat("--:|", len(g.columns)))
}

func (r *results) rows(w io.Writer, s *scenario) {
	for _, system := range systemOrder {
		if len(r.of(s, system, s.group.columns[0])) == 0 {
			continue
		}
		fmt.Fprintf(w, "| %s | %s |", s.name, system)
		for _, c := range s.group.columns {
			fmt.Fprintf(w, " %s |", format(medianOf(r.of(s, system, c))))
		}
		fmt.Fprintf(w, " %s |\n", format(r.ratio(s, system)))
	}
}

// ratio returns the median of ours divided by the system's, each within its
// round; NaN if there is nothing to compare.
func (r *results) ratio(s *scenario, system string) float64 {
	if system == "ours" {
		return math.NaN()
	}
	ours, theirs := r.of(s, "ours", s.group.ratio), r.of(s, system, s.group.ratio)
	ratios := make(map[int]float64)
	for round, v := range theirs {
		if our, ok := ours[round]; ok && v > 0 {
			ratios[round] = our / v
		}
	}
	return medianOf(ratios)
}

func medianOf(byRound map[int]float64) float64 {
	var values []float64
	for _, v := range byRound {
		values = append(values, v)
	}
	return median(values)
}

// median returns NaN for nothing.
func median(values []float64) float64 {
	n := len(values)
	if n == 0 {
		return math.NaN()
	}
	slices.Sort(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

// format writes a number with three significant digits.
func format(x float64) string {
	switch {
	case math.IsNaN(x):
		return "-"
	case x == 0:
		return "0"
	case math.Abs(x) < 100:
		digits := 2 - int(math.Floor(math.Log10(math.Abs(x))))
		return strconv.FormatFloat(x, 'f', min(max(digits, 0), 4), 64)
	}
	unit := math.Pow(10, math.Floor(math.Log10(math.Abs(x)))-2)
	return thousands(strconv.FormatFloat(math.Round(x/unit)*unit, 'f', 0, 64))
}

// thousands puts commas into a whole number.
func thousands(digits string) string {
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

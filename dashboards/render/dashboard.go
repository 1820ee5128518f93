package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// dashboard is what is drawn of a Grafana dashboard.
type dashboard struct {
	Title      string
	Templating struct {
		List []struct{ Name, Type string }
	}
	Panels []panel
}

type panel struct {
	Type, Title string
	GridPos     struct{ X, Y, W, H int }
	Targets     []struct{ Expr, LegendFormat string }
	FieldConfig struct {
		Defaults struct {
			Unit     string
			Mappings []struct {
				Options map[string]struct{ Text string }
			}
			Thresholds struct {
				Steps []struct {
					Color string
					Value *float64 // nil: below all others
				}
			}
		}
	}
}

func readDashboard(file string) (d dashboard, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return d, err
	}
	if err := json.Unmarshal(text, &d); err != nil {
		return d, fmt.Errorf("%s: %w", file, err)
	}
	return d, nil
}

// prometheus is the server whose answers are drawn.
type prometheus struct {
	url        string
	start, end time.Time
	step       time.Duration // also the interval at which it scrapes
}

type series struct {
	name   string
	points []point
}

type point struct {
	at time.Time
	v  float64
}

// expression returns a target's expression for all values of the dashboard's
// variables, with the rate interval that Grafana would take: four scrapes.
func (p prometheus) expression(d dashboard, expr string) string {
	expr = strings.ReplaceAll(expr, "$__rate_interval", fmt.Sprintf("%ds", int((4*p.step).Seconds())))
	for _, v := range d.Templating.List {
		if v.Type == "query" {
			expr = strings.ReplaceAll(expr, "$"+v.Name, ".*")
		}
	}
	return expr
}

var placeholder = regexp.MustCompile(`{{(\w+)}}`)

// query evaluates all targets of a panel.
func (p prometheus) query(ctx context.Context, d dashboard, panel panel) (all []series, err error) {
	for _, target := range panel.Targets {
		results, err := p.queryRange(ctx, p.expression(d, target.Expr))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", target.Expr, err)
		}
		for _, r := range results {
			s := series{name: placeholder.ReplaceAllStringFunc(target.LegendFormat, func(m string) string {
				return r.Metric[strings.Trim(m, "{}")]
			})}
			for _, v := range r.Values {
				seconds, ok := v[0].(float64)
				text, isText := v[1].(string)
				value, err := strconv.ParseFloat(text, 64)
				if !ok || !isText || err != nil {
					return nil, fmt.Errorf("%s: Prometheus answered %v for a point", target.Expr, v)
				}
				s.points = append(s.points, point{time.UnixMilli(int64(seconds * 1000)), value})
			}
			all = append(all, s)
		}
	}
	return all, nil
}

type result struct {
	Metric map[string]string
	Values [][2]any // seconds, and the value as a text
}

func (p prometheus) queryRange(ctx context.Context, expr string) ([]result, error) {
	query := url.Values{
		"query": {expr}, "step": {fmt.Sprint(p.step.Seconds())},
		"start": {fmt.Sprint(p.start.Unix())}, "end": {fmt.Sprint(p.end.Unix())},
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+"/api/v1/query_range?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct{ Result []result }
	}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
		return nil, fmt.Errorf("%s: %w", response.Status, err)
	}
	if answer.Status != "success" {
		return nil, fmt.Errorf("%s: %s", response.Status, answer.Error)
	}
	slices.SortFunc(answer.Data.Result, func(a, b result) int {
		return strings.Compare(fmt.Sprint(a.Metric), fmt.Sprint(b.Metric))
	})
	return answer.Data.Result, nil
}

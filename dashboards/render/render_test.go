package main

import (
	"fmt"
	"image/png"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var testEnd = time.Unix(1_700_000_000, 0)

// server answers every query with two series: one with a hole, and one with a NaN.
func server(t *testing.T, queries *[]string) prometheus {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*queries = append(*queries, r.URL.Query().Get("query"))
		at := testEnd.Unix()
		fmt.Fprintf(w, `{"status":"success","data":{"result":[
			{"metric":{"topic":"orders","group":"b"},"values":[[%d,"1"],[%d,"2"],[%d.5,"30"]]},
			{"metric":{"topic":"orders","group":"a"},"values":[[%d,"NaN"],[%d,"1"]]}]}}`, at-60, at-55, at-20, at-10, at-5)
	}))
	t.Cleanup(s.Close)
	return prometheus{s.URL, testEnd.Add(-time.Minute), testEnd, 5 * time.Second}
}

// The dashboard of this repository is drawn as a whole.
func TestRender(t *testing.T) {
	var queries []string
	out := filepath.Join(t.TempDir(), "out.png")
	require.NoError(t, render(t.Context(), server(t, &queries), "../goxstreams.json", out, dpi/4))
	d, err := readDashboard("../goxstreams.json")
	require.NoError(t, err)
	targets := 0
	for _, panel := range d.Panels {
		targets += len(panel.Targets)
	}
	require.Greater(t, targets, 20)
	require.Len(t, queries, targets)
	for _, query := range queries {
		require.NotContains(t, query, "$", "all variables are known")
		require.True(t, strings.Contains(query, `{topic=~".*",group=~".*"}`), query)
	}
	f, err := os.Open(out)
	require.NoError(t, err)
	defer f.Close()
	picture, err := png.Decode(f)
	require.NoError(t, err)
	require.Equal(t, pageWidth/4, picture.Bounds().Dx())
}

func TestQuery(t *testing.T) {
	var queries []string
	p := server(t, &queries)
	d, err := readDashboard("../goxstreams.json")
	require.NoError(t, err)
	var panel panel
	panel.Targets = append(panel.Targets, struct{ Expr, LegendFormat string }{"rate(x[$__rate_interval])", "{{topic}}, {{group}}"})
	data, err := p.query(t.Context(), d, panel)
	require.NoError(t, err)
	require.Equal(t, []string{"rate(x[20s])"}, queries)
	require.Len(t, data, 2)
	require.Equal(t, "orders, a", data[0].name)
	require.Len(t, drawing{prometheus: p}.parts(data[0].points), 1, "NaN is no point")
	parts := drawing{prometheus: p}.parts(data[1].points)
	require.Len(t, parts, 2, "nothing is drawn where nothing was measured")
	require.Equal(t, float64(testEnd.Unix())-19.5, parts[1][0].X)
}

func TestPrometheusRefuses(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `{"status":"error","error":"parse error"}`)
	}))
	defer s.Close()
	out := filepath.Join(t.TempDir(), "out.png")
	err := render(t.Context(), prometheus{s.URL, testEnd.Add(-time.Minute), testEnd, time.Second}, "../goxstreams.json", out, dpi)
	require.ErrorContains(t, err, "parse error")
	require.NoFileExists(t, out)
}

func TestFormat(t *testing.T) {
	for want, got := range map[string]string{
		"1.5 min": format("s", 90), "30 s": format("s", 30), "0.25/s": format("cps", 0.25), "12.5 K": format("short", 12500), "3 M": format("short", 3e6),
	} {
		require.Equal(t, want, got)
	}
}

package main

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goxstreams/watermill-goxstreams/plugin/goxprom"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
)

var desc = regexp.MustCompile(`fqName: "(\w+)", .*variableLabels: \{([^}]*)\}\}$`)

// exported returns the labels of each of goxprom's metrics.
func exported(t *testing.T) map[string][]string {
	t.Helper()
	descs := make(chan *prometheus.Desc, 100)
	goxprom.NewCollector(goxprom.Config{}).Describe(descs)
	close(descs)
	labels := map[string][]string{}
	for d := range descs {
		parts := desc.FindStringSubmatch(d.String())
		require.NotNil(t, parts, d)
		labels[parts[1]] = strings.Split(parts[2], ",")
	}
	require.Greater(t, len(labels), 20)
	return labels
}

var (
	named     = regexp.MustCompile(`\bgoxstreams_\w+`)
	selection = regexp.MustCompile(`\b(goxstreams_\w+)\{([^}]*)\}`)
	matcher   = regexp.MustCompile(`(\w+)(?:=~|!~|!=|=)"`)
	ofTarget  = []string{"job", "namespace", "instance"} // labels that Prometheus adds
)

// requireExported checks that an expression selects metrics that exist, by labels that they
// have. It returns the metrics' names.
func requireExported(t *testing.T, expr string) (names []string) {
	t.Helper()
	labels := exported(t)
	metric := func(name string) string {
		for _, suffix := range []string{"_bucket", "_count", "_sum"} {
			if base, ok := strings.CutSuffix(name, suffix); ok && strings.HasSuffix(base, "_seconds") {
				return base
			}
		}
		return name
	}
	for _, name := range named.FindAllString(expr, -1) {
		require.Contains(t, labels, metric(name), expr)
		names = append(names, metric(name))
	}
	require.NotEmpty(t, names, expr)
	for _, s := range selection.FindAllStringSubmatch(expr, -1) {
		for _, m := range matcher.FindAllStringSubmatch(s[2], -1) {
			require.Contains(t, slices.Concat(labels[metric(s[1])], ofTarget), m[1], expr)
		}
	}
	return names
}

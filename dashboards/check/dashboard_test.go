package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

// classic is the model that Grafana imports and provisions, in every version.
//
//lint:ignore SA1019 its successor needs Grafana 12 and a Kubernetes resource around it
type classic = dashboard.Dashboard

// unmarshal reads a dashboard by Grafana's own schema, which refuses unknown fields and
// missing ones, also those of the panels' options and of queries. What refuses them does not
// fill in the panels; it says that it has found nothing by an error without any.
func unmarshal(text []byte) (d classic, err error) {
	runtime := cog.NewRuntime() // one for all, which knows what is registered
	runtime.RegisterPanelcfgVariant(stat.VariantConfig())
	runtime.RegisterPanelcfgVariant(timeseries.VariantConfig())
	runtime.RegisterDataqueryVariant(prometheus.VariantConfig())
	err = new(classic).UnmarshalJSONStrict(text)
	var errs cog.BuildErrors
	if err != nil && (!errors.As(err, &errs) || len(errs) > 0) {
		return d, err
	}
	return d, json.Unmarshal(text, &d)
}

func read(t *testing.T, file string) classic {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	d, err := unmarshal(text)
	require.NoError(t, err)
	require.NoError(t, d.Validate())
	return d
}

// panels returns the panels that are no rows.
func panels(d classic) (panels []dashboard.Panel) {
	for _, p := range d.Panels {
		if p.Panel != nil {
			panels = append(panels, *p.Panel)
		}
	}
	return panels
}

// queries returns a panel's.
func queries(t *testing.T, p dashboard.Panel) (queries []prometheus.Dataquery) {
	t.Helper()
	for _, target := range p.Targets {
		query, ok := target.(prometheus.Dataquery)
		if !ok {
			pointer, isPointer := target.(*prometheus.Dataquery)
			require.True(t, isPointer, "%s: %T", *p.Title, target)
			query = *pointer
		}
		queries = append(queries, query)
	}
	require.NotEmpty(t, queries, *p.Title)
	return queries
}

func TestSchema(t *testing.T) {
	for _, file := range []string{promDashboard, otelDashboard} {
		d := read(t, file)
		require.Greater(t, len(panels(d)), 20, file)
	}
}

// A schema that accepted everything would prove nothing.
func TestSchemaRefuses(t *testing.T) {
	text, err := os.ReadFile(promDashboard)
	require.NoError(t, err)
	for from, to := range map[string]string{
		`"refresh": "10s"`:      `"refreshed": "10s"`,
		`"placement": "bottom"`: `"place": "bottom"`,
		`"editorMode": "code"`:  `"editor": "code"`,
		`"schemaVersion": 41`:   `"schemaVersion": "41"`,
		`"fillOpacity": 8`:      `"fill": 8`,
	} {
		require.Contains(t, string(text), from)
		_, err := unmarshal([]byte(strings.ReplaceAll(string(text), from, to)))
		require.Error(t, err, to)
	}
}

// What a reader needs: each panel is explained, has a unit and the dashboard's data source,
// covers no other one, and is filtered by all variables.
func TestPanels(t *testing.T) {
	d := read(t, promDashboard)
	taken := map[[2]uint32]string{}
	ids := map[uint32]bool{}
	for _, p := range panels(d) {
		require.Contains(t, []string{"stat", "timeseries"}, p.Type, "whose options are checked")
		title := *p.Title
		require.NotEmpty(t, title)
		require.NotEmpty(t, *p.Description, title)
		require.NotEmpty(t, *p.FieldConfig.Defaults.Unit, title)
		require.False(t, ids[*p.Id], title)
		ids[*p.Id] = true
		require.Equal(t, "${datasource}", *p.Datasource.Uid, title)
		require.LessOrEqual(t, p.GridPos.X+p.GridPos.W, uint32(24), title)
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				require.Empty(t, taken[[2]uint32{x, y}], title)
				taken[[2]uint32{x, y}] = title
			}
		}
		for i, q := range queries(t, p) {
			require.Equal(t, string(rune('A'+i)), *q.RefId, title)
			require.Equal(t, "${datasource}", *q.Datasource.Uid, title)
			variables := []string{"job", "namespace", "instance", "topic"}
			if !strings.Contains(q.Expr, "goxstreams_topic_") && !strings.Contains(q.Expr, "goxstreams_publisher_") {
				variables = append(variables, "group")
			}
			for _, s := range selection.FindAllStringSubmatch(q.Expr, -1) {
				for _, v := range variables {
					require.Contains(t, s[2], fmt.Sprintf(`%s=~"$%s"`, v, v), "%s: %s", title, q.Expr)
				}
			}
		}
	}
}

func TestVariables(t *testing.T) {
	var names []string
	for _, v := range read(t, promDashboard).Templating.List {
		names = append(names, v.Name)
		if v.Type != dashboard.VariableTypeQuery {
			continue
		}
		require.Equal(t, "${datasource}", *v.Datasource.Uid, v.Name)
		require.Equal(t, ".*", *v.AllValue, "series without that label are among All")
		require.Contains(t, *v.Definition, ", "+v.Name+")")
	}
	require.Equal(t, []string{"datasource", "job", "namespace", "instance", "topic", "group"}, names)
}

// Each metric is shown, and each that is shown exists.
func TestMetrics(t *testing.T) {
	var shown []string
	for _, p := range panels(read(t, promDashboard)) {
		for _, q := range queries(t, p) {
			shown = append(shown, requireExported(t, q.Expr)...)
		}
	}
	for name := range exported(t) {
		require.Contains(t, shown, name)
	}
}

// What documents speak of exists. The command's exporter has some of its own.
func TestDocuments(t *testing.T) {
	for _, file := range []string{"../README.md", runbook} {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		names := regexp.MustCompile("`(goxstreams_\\w+)").FindAllStringSubmatch(string(text), -1)
		require.NotEmpty(t, names, file)
		for _, name := range names {
			if !strings.HasPrefix(name[1], "goxstreams_exporter_") {
				require.Contains(t, exported(t), name[1], file)
			}
		}
	}
}

// Prometheus understands the queries: promtool takes them for rules.
func TestQueries(t *testing.T) {
	type rule struct {
		Record string `yaml:"record"`
		Expr   string `yaml:"expr"`
	}
	type group struct {
		Name  string `yaml:"name"`
		Rules []rule `yaml:"rules"`
	}
	variables := strings.NewReplacer("$__rate_interval", "1m")
	for _, file := range []string{promDashboard, otelDashboard} {
		var rules []rule
		for _, p := range panels(read(t, file)) {
			for i, q := range queries(t, p) {
				expr := variables.Replace(q.Expr)
				require.NotContains(t, strings.ReplaceAll(expr, `=~"$`, ""), "$", "a variable that is unknown here")
				rules = append(rules, rule{fmt.Sprintf("panel:%d:%d", *p.Id, i), expr})
			}
		}
		text, err := yaml.Marshal(map[string][]group{"groups": {{file, rules}}})
		require.NoError(t, err)
		path := filepath.Join(t.TempDir(), "rules.yaml")
		require.NoError(t, os.WriteFile(path, text, 0o600))
		promtool(t, "check", "rules", path)
	}
}

// The dashboard for goxotel's metrics is goxprom's, with other names.
func TestOTel(t *testing.T) {
	prom, err := os.ReadFile(promDashboard)
	require.NoError(t, err)
	otel, err := os.ReadFile(otelDashboard)
	require.NoError(t, err)
	require.Equal(t, forOTel(string(prom)), string(otel), "go run -C dashboards/check .")

	d := read(t, otelDashboard)
	require.Equal(t, "goxstreams (OpenTelemetry)", *d.Title)
	renamed := []string{"goxstreams_handler_duration_seconds", "goxstreams_publisher_messages_total", "goxstreams_publisher_duration_seconds"}
	for _, p := range panels(d) {
		for _, q := range queries(t, p) {
			require.NotRegexp(t, `[^$\w](topic|group|dead_letter_topic|success|outcome)\b`, q.Expr, *p.Title)
			require.NotRegexp(t, `{{(topic|group|dead_letter_topic|success|outcome)}}`, *q.LegendFormat, *p.Title)
			for _, name := range named.FindAllString(q.Expr, -1) {
				require.False(t, slices.ContainsFunc(renamed, func(old string) bool { return strings.HasPrefix(name, old) }), q.Expr)
			}
		}
	}
	for from, want := range map[string]string{
		`"title": "Messages by topic, group",`:      `"title": "Messages by topic, group",`,
		`  "legendFormat": "of a topic: {{topic}}"`: `  "legendFormat": "of a topic: {{messaging_destination_name}}"`,
		`  "expr": "sum by (topic, group) (rate(goxstreams_handler_duration_seconds_count{success=\"false\",topic=~\"$topic\"}[1m]))"`: `  "expr": "sum by (messaging_destination_name, messaging_consumer_group_name) (rate(messaging_process_duration_seconds_count{error_type!=\"\",messaging_destination_name=~\"$topic\"}[1m]))"`,
		`  "expr": "sum by (topic, outcome) (goxstreams_publisher_messages_total{outcome=\"unknown\"})"`:                               `  "expr": "sum by (messaging_destination_name, error_type) (messaging_client_sent_messages_total{error_type=\"goxstreams.ErrOutcomeUnknown\"})"`,
		`  "expr": "max by (topic) (goxstreams_topic_entries)"`:                                                                        `  "expr": "max by (messaging_destination_name) (goxstreams_topic_entries)"`,
		`  "query": "label_values(goxstreams_subscriptions_open, group)",`:                                                             `  "query": "label_values(goxstreams_subscriptions_open, messaging_consumer_group_name)",`,
	} {
		require.Equal(t, want, forOTel(from))
	}
}

package main

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

const (
	alertRules = "../alerts.yaml"
	alertTests = "testdata/alerts_test.yaml"
	runbook    = "../../docs/operations.md"
	runbookURL = "https://github.com/goxstreams/watermill-goxstreams/blob/main/docs/operations.md#"
)

type alert struct {
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	For         string            `yaml:"for"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

func load(t *testing.T, file string, into any) {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	require.NoError(t, yaml.Unmarshal(text, into))
}

func alerts(t *testing.T) []alert {
	t.Helper()
	var file struct {
		Groups []struct {
			Rules []alert `yaml:"rules"`
		} `yaml:"groups"`
	}
	load(t, alertRules, &file)
	require.Len(t, file.Groups, 1)
	return file.Groups[0].Rules
}

// Prometheus accepts the rules, and they fire when they must, and only then.
func TestAlertRules(t *testing.T) {
	promtool(t, "check", "rules", alertRules)
	promtool(t, "test", "rules", alertTests)
}

func TestAlertsAreComplete(t *testing.T) {
	operations, err := os.ReadFile(runbook)
	require.NoError(t, err)
	for _, a := range alerts(t) {
		requireExported(t, a.Expr)
		require.Contains(t, []string{"critical", "warning"}, a.Labels["severity"], a.Alert)
		require.NotEmpty(t, a.Annotations["summary"], a.Alert)
		require.NotEmpty(t, a.Annotations["description"], a.Alert)
		require.Equal(t, runbookURL+strings.ToLower(a.Alert), a.Annotations["runbook_url"])
		require.Equal(t, 1, strings.Count(string(operations), "\n### "+a.Alert+"\n"), "docs/operations.md has a section: %s", a.Alert)
	}
}

// docs/operations.md explains no alert that does not exist.
func TestRunbooksHaveAlerts(t *testing.T) {
	operations, err := os.ReadFile(runbook)
	require.NoError(t, err)
	var known []string
	for _, a := range alerts(t) {
		known = append(known, a.Alert)
	}
	for line := range strings.Lines(string(operations)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "### Goxstreams"); ok {
			require.Contains(t, known, "Goxstreams"+name)
		}
	}
}

// Each alert is tested where it fires, and where it does not.
func TestAlertsAreTested(t *testing.T) {
	var file struct {
		Tests []struct {
			Rules []struct {
				Alert  string `yaml:"alertname"`
				Alerts []any  `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		} `yaml:"tests"`
	}
	load(t, alertTests, &file)
	fires, quiet := map[string]bool{}, map[string]bool{}
	for _, test := range file.Tests {
		for _, rule := range test.Rules {
			if len(rule.Alerts) > 0 {
				fires[rule.Alert] = true
			} else {
				quiet[rule.Alert] = true
			}
		}
	}
	for _, a := range alerts(t) {
		require.True(t, fires[a.Alert], a.Alert)
		require.True(t, quiet[a.Alert], a.Alert)
	}
}

package main

import (
	"regexp"
	"strings"
)

// labels are those of goxprom, and what OpenTelemetry's names become in Prometheus. The
// conventions have the kind of an error where goxprom has success and outcome.
var labels = map[string]string{
	"topic": "messaging_destination_name", "group": "messaging_consumer_group_name", "dead_letter_topic": "goxstreams_dead_letter_topic",
	"success": "error_type", "outcome": "error_type",
}

// metrics are those of goxprom for which OpenTelemetry's conventions have others, and the
// values of labels.
var metrics = strings.NewReplacer(
	"goxstreams_handler_duration_seconds", "messaging_process_duration_seconds",
	"goxstreams_publisher_messages_total", "messaging_client_sent_messages_total",
	"goxstreams_publisher_duration_seconds_bucket{", `messaging_client_operation_duration_seconds_bucket{messaging_operation_type=\"send\",`,
	"goxstreams_publisher_duration_seconds_count{", `messaging_client_operation_duration_seconds_count{messaging_operation_type=\"send\",`,
	"goxstreams_publisher_duration_seconds_sum{", `messaging_client_operation_duration_seconds_sum{messaging_operation_type=\"send\",`,
	`success=\"true\"`, `error_type=\"\"`,
	`success=\"false\"`, `error_type!=\"\"`,
	`outcome=\"stored\"`, `error_type=\"\"`,
	`outcome=\"failed\"`, `error_type!~\"|goxstreams.ErrOutcomeUnknown\"`,
	`outcome=\"unknown\"`, `error_type=\"goxstreams.ErrOutcomeUnknown\"`,
	`outcome!=\"stored\"`, `error_type!=\"\"`,
)

var (
	queried = regexp.MustCompile(`^\s*"(?:expr|definition|query)": `)
	legend  = regexp.MustCompile(`^\s*"legendFormat": `)
	label   = regexp.MustCompile(`([^$\w])(topic|group|dead_letter_topic|success|outcome)\b`)
	shown   = regexp.MustCompile(`({{)(\w+)\b`)
	heading = strings.NewReplacer(
		`"uid": "goxstreams"`, `"uid": "goxstreams-otel"`, `"title": "goxstreams"`, `"title": "goxstreams (OpenTelemetry)"`,
		"by the metrics of plugin/goxprom", "by the metrics of plugin/goxotel in Prometheus",
	)
)

// forOTel returns a dashboard over goxprom's metrics as one over goxotel's, as a
// Prometheus stores those.
func forOTel(dashboard string) string {
	var out strings.Builder
	for line := range strings.Lines(dashboard) {
		switch prefix := queried.FindString(line); {
		case prefix != "":
			out.WriteString(prefix + rename(label, metrics.Replace(line[len(prefix):])))
		case legend.MatchString(line):
			out.WriteString(rename(shown, line))
		default:
			out.WriteString(heading.Replace(line))
		}
	}
	return out.String()
}

// rename renames the labels that a pattern finds, as its second group.
func rename(pattern *regexp.Regexp, text string) string {
	return pattern.ReplaceAllStringFunc(text, func(found string) string {
		parts := pattern.FindStringSubmatch(found)
		if name, ok := labels[parts[2]]; ok {
			return parts[1] + name
		}
		return found
	})
}

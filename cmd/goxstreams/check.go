package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// status is the exit code of a monitoring plugin.
type status int

const (
	statusOK status = iota
	statusWarning
	statusCritical
	statusUnknown
)

func (s status) String() string { return [...]string{"OK", "WARNING", "CRITICAL", "UNKNOWN"}[s] }

// worse returns the one that is to be seen: what is known to be bad hides behind nothing that is
// not known, and what is not known behind nothing that is good.
func (s status) worse(other status) status {
	severity := map[status]int{statusOK: 0, statusUnknown: 1, statusWarning: 2, statusCritical: 3}
	if severity[other] > severity[s] {
		return other
	}
	return s
}

// Error makes it an error by which the command ends: it has been printed.
func (s status) Error() string { return "status " + s.String() }

// threshold is a flag's WARNING,CRITICAL: more than that is bad.
type threshold struct {
	warning, critical float64 // infinite: none
	isSet             bool
	age               bool // in seconds, written as ages
}

func (t *threshold) Type() string { return "WARNING,CRITICAL" }

func (t *threshold) String() string {
	if t == nil || !t.isSet {
		return ""
	}
	return t.part(t.warning) + "," + t.part(t.critical)
}

// part returns one of the two as monitoring plugins print it.
func (t *threshold) part(v float64) string {
	if math.IsInf(v, 0) {
		return ""
	}
	return strconv.FormatFloat(v, 'f', -1, 64)
}

func (t *threshold) Set(s string) error {
	first, second, both := strings.Cut(s, ",")
	if !both {
		first, second = "", s
	}
	var err error
	if t.warning, err = t.parse(first); err != nil {
		return err
	}
	if t.critical, err = t.parse(second); err != nil {
		return err
	}
	switch {
	case math.IsInf(t.warning, 0) && math.IsInf(t.critical, 0):
		return errors.New("both thresholds are empty")
	case t.warning > t.critical && !math.IsInf(t.warning, 0):
		return errors.New("WARNING is more than CRITICAL")
	}
	t.isSet = true
	return nil
}

func (t *threshold) parse(s string) (float64, error) {
	if s = strings.TrimSpace(s); s == "" {
		return math.Inf(1), nil
	}
	if t.age {
		age, err := parseAge(s)
		if err != nil {
			return 0, fmt.Errorf("%q is no age such as 90s, 15m, 12h or 3d", s)
		}
		return age.Seconds(), nil
	}
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number of 0 or more", s)
	}
	return float64(n), nil
}

// judge returns the status of a value.
func (t *threshold) judge(v float64) (status, float64) {
	switch {
	case v > t.critical:
		return statusCritical, t.critical
	case v > t.warning:
		return statusWarning, t.warning
	}
	return statusOK, 0
}

// check is what the flags say.
type check struct {
	topic, group      string // all groups if it is empty
	stream            string
	lag, dead, oldest threshold
	overdue           threshold
	timeout           time.Duration

	status   status
	problems []string
	facts    []string
	perf     []string
}

func (a *app) checkCommand() *cobra.Command {
	c := check{oldest: threshold{age: true}, overdue: threshold{age: true}}
	cmd := &cobra.Command{
		Use:   "check TOPIC [GROUP]",
		Short: "Compare a topic with thresholds, as a monitoring plugin",
		Long: `Compare a topic, and one of its groups or all, with thresholds, and print one line with performance
data, as a plugin of Nagios, Icinga and others. Each threshold is WARNING,CRITICAL, the greatest values
that are neither; "WARNING," or ",CRITICAL" is only that one, and so is CRITICAL without a comma.

Exit codes: 0 OK; 1 WARNING; 2 CRITICAL, also if Redis does not answer; 3 UNKNOWN: wrong arguments, a
missing right, no such topic or group, or a lag that Redis does not know, unless something known is
worse than the thresholds.`,
		ValidArgsFunction: a.completeTopicAndGroup,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return a.plugin(a.checkOutput(cmd)) },
		Args: func(cmd *cobra.Command, args []string) error {
			return a.plugin(cobra.RangeArgs(1, 2)(cmd, args))
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c.topic, c.group = args[0], strings.Join(args[1:], "")
			return a.check(cmd.Context(), &c)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return a.plugin(err) })
	flags := cmd.Flags()
	flags.Var(&c.lag, "max-lag", "entries that a group has not read yet, such as 1000,10000")
	flags.Var(&c.oldest, "max-oldest", "age of a group's oldest pending entry, such as 5m,1h")
	flags.Var(&c.dead, "max-dead", "dead letters of the topic, of all groups, such as 0,100")
	flags.Var(&c.overdue, "max-overdue", "how long a delayed message of the topic has been due, such as 10s,5m")
	flags.DurationVar(&c.timeout, "timeout", 10*time.Second, "CRITICAL if Redis has not answered by then")
	flags.StringVar(&c.stream, "stream", "", "the dead-letter stream, where it has a name of its own")
	return cmd
}

// plugin prints an error as monitoring plugins do; wrong arguments must not have the exit code of
// CRITICAL.
func (a *app) plugin(err error) error {
	if err == nil {
		return nil
	}
	a.began = true
	a.printf("GOXSTREAMS UNKNOWN - %s\n", pluginText(err.Error()))
	return statusUnknown
}

// pluginText is text on one line and before the performance data, which begin with a bar.
func pluginText(s string) string {
	return strings.ReplaceAll(safe(strings.ReplaceAll(s, "\n", " ")), "|", `\x7c`)
}

func (a *app) check(ctx context.Context, c *check) error {
	switch {
	case c.topic == "":
		return a.plugin(errors.New("TOPIC is empty"))
	case !c.lag.isSet && !c.dead.isSet && !c.oldest.isSet && !c.overdue.isSet:
		return a.plugin(errors.New("which: --max-lag, --max-oldest, --max-dead or --max-overdue?"))
	case c.timeout <= 0:
		return a.plugin(errors.New("--timeout must be more than 0"))
	case a.forScripts():
		return a.plugin(errors.New("check prints a plugin's line: no --output"))
	}
	s, err := bounded(ctx, c.timeout, func(ctx context.Context) (topicState, error) { return a.stateOf(ctx, c) })
	switch {
	case ctx.Err() != nil:
		return a.plugin(errors.New("interrupted"))
	case errors.As(err, new(usageError)) || err != nil && refused(err):
		return a.plugin(errors.New(explain(err)))
	case err != nil:
		a.printf("GOXSTREAMS CRITICAL - Redis does not answer: %s\n", pluginText(explain(err)))
		return statusCritical
	}
	c.look(s)
	about := c.problems
	if c.status == statusOK {
		about = c.facts
	}
	a.printf("GOXSTREAMS %s - %s", c.status.String(), pluginText(fmt.Sprintf("%s: %s", c.topic, strings.Join(about, ", "))))
	if len(c.perf) > 0 {
		a.printf(" | %s", strings.Join(c.perf, " "))
	}
	a.printf("\n")
	if c.status == statusOK {
		return nil
	}
	return c.status
}

// stateOf asks Redis by a client of its own, since it may still wait when nobody waits for it any more.
func (a *app) stateOf(ctx context.Context, c *check) (topicState, error) {
	client := a.client
	if client == nil {
		var err error
		if client, err = a.conn.open(ctx); err != nil {
			return topicState{}, err
		}
		defer client.Close()
	}
	s := states(ctx, client, []string{c.topic}, question{deadTopic: c.stream})[0]
	return s, brokenOf([]topicState{s})
}

// look compares the topic with the thresholds.
func (c *check) look(s topicState) {
	ofGroups := c.lag.isSet || c.oldest.isSet || c.group != ""
	if !s.exists && s.err == nil && (ofGroups || s.delayed <= 0) { // a topic may begin with delayed messages
		c.fail(statusUnknown, "there is no such stream")
	}
	found := false
	for _, g := range s.groups {
		if c.group != "" && g.Name != c.group {
			continue
		}
		found = true
		c.compare(&c.lag, "lag", g.Name, float64(g.Lag), "")
		oldest := g.oldest.Seconds()
		if g.err != nil {
			oldest = -1
		}
		c.compare(&c.oldest, "oldest", g.Name, oldest, "s")
	}
	if s.exists && !found && ofGroups {
		name := "a group"
		if c.group != "" {
			name = fmt.Sprintf("group %q", c.group)
		}
		c.fail(statusUnknown, "it does not have "+name)
	}
	c.compare(&c.dead, "dead", "", float64(s.deadLetters), "")
	overdue := -1.0
	if s.overdue != nil {
		overdue = *s.overdue
	}
	c.compare(&c.overdue, "overdue", "", overdue, "s")
	if c.overdue.isSet && s.delayedErr != nil {
		c.fail(statusUnknown, explain(s.delayedErr))
	}
	if s.err != nil {
		c.fail(statusUnknown, explain(s.err))
	}
}

func (c *check) fail(s status, problem string) {
	c.status = c.status.worse(s)
	c.problems = append(c.problems, problem)
}

// compare judges a value; less than 0 is one that is not known.
func (c *check) compare(t *threshold, what, group string, v float64, unit string) {
	if !t.isSet {
		return
	}
	name, label := what, what
	if group != "" {
		name, label = group+" "+what, what+"_"+group
	}
	if v < 0 {
		c.perf = append(c.perf, perfLabel(label)+"=U")
		c.fail(statusUnknown, name+" is not known")
		return
	}
	v = math.Round(v*1000) / 1000
	c.perf = append(c.perf, fmt.Sprintf("%s=%s%s;%s;%s;0", perfLabel(label), t.part(v), unit, t.part(t.warning), t.part(t.critical)))
	shown := func(v float64) string {
		if t.age {
			return ago(time.Duration(v * float64(time.Second)))
		}
		return t.part(v)
	}
	fact := name + " " + shown(v)
	c.facts = append(c.facts, fact)
	if s, limit := t.judge(v); s != statusOK {
		c.fail(s, fmt.Sprintf("%s (%s is more than %s)", fact, s.String(), shown(limit)))
	}
}

// perfLabel returns a label of performance data, in which quotes, bars and equals signs have a
// meaning.
func perfLabel(s string) string {
	return "'" + strings.NewReplacer("'", `\x27`, "=", `\x3d`, "|", `\x7c`).Replace(safe(s)) + "'"
}

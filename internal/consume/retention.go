package consume

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/ThreeDotsLabs/watermill"

	"github.com/goxstreams/watermill-goxstreams/internal/redisx"
	"github.com/goxstreams/watermill-goxstreams/internal/takeover"
	"github.com/goxstreams/watermill-goxstreams/internal/xstream"
)

const (
	// RetentionInterval is how often a stream is trimmed while it grows. Of its
	// consumers one does it.
	RetentionInterval = time.Second

	// MaxTrims is how many runs of the script one trimming may take, of about a
	// millisecond each: a hundredth of the server's time, fewer if there are very many groups. A stream that grows all the same
	// takes up to catchUp times as many, and one that exceeds HardMaxLen as many as it needs.
	MaxTrims = 10
	catchUp  = 10

	maxTrimming = MaxTrims * time.Millisecond

	// retentionDenied is the pause while the permission is missing.
	retentionDenied = time.Minute

	// pinnedAfter is the age from which an entry that holds up retention is reported: no
	// consumer that is alive takes so long, but for retries and long handlers.
	pinnedAfter = 10 * time.Minute
)

// trimmer trims one stream.
type trimmer struct {
	*Subscription
	stream xstream.Stream
	own    string // the group, or the name of the fan-out's position, without which it does not trim
	keep   xstream.Retention
	duty   string
	fields watermill.LogFields

	length int64       // of the stream, after the last trimming
	pinned xstream.Pin // what is logged already
}

func (s *Subscription) startRetention() {
	if s.cfg.Retention != nil {
		t := &trimmer{Subscription: s, stream: s.stream, own: s.stream.Group, keep: *s.cfg.Retention, duty: dutyTrim, fields: s.cfg.Fields}
		if m, ok := s.mode.(fanOut); ok {
			t.own = m.position.name
		}
		s.loops.running.Go(t.run)
	}
	if s.cfg.KeepDeadLetters > 0 {
		t := &trimmer{Subscription: s, stream: s.stream, keep: xstream.Retention{KeepFor: s.cfg.KeepDeadLetters}, duty: dutyTrimDead}
		t.stream.Key = s.cfg.DeadLetters
		t.fields = s.cfg.Fields.Add(watermill.LogFields{"dead_letter_topic": t.stream.Key})
		s.loops.running.Go(t.run)
	}
}

// run trims the stream until the subscription closes. All subscriptions do this, without
// a leader: the script lets one of them trim in each interval.
func (t *trimmer) run() {
	repeat(t.life.closing.Done(), nil, 0, func() time.Duration {
		wait, err := t.trim()
		if t.mark(t.duty, err) {
			t.cfg.Log.Info("No permission to trim the stream; other Subscribers of the topic must: "+err.Error(), t.fields)
		}
		switch {
		case redisx.IsDenied(err):
			wait = takeover.Jitter(retentionDenied)
		case err != nil:
			wait = takeover.Jitter(RetentionInterval)
		}
		return max(wait, time.Millisecond)
	})
}

// trim trims the stream, if nobody has done so within the interval, and returns when to
// ask again.
func (t *trimmer) trim() (wait time.Duration, err error) {
	cut := make(map[string]int64)
	defer func() { t.logCut(cut) }()
	interval, took := RetentionInterval, time.Duration(0)
	oldest := ""
	if t.own != "" {
		oldest = t.ledger.Oldest()
	}
	for {
		got, err := t.stream.Trim(t.life.ctx, t.keep, t.own, oldest, interval)
		if err != nil {
			return 0, err
		}
		wait = max(wait, got.Wait)
		if !got.Ran {
			return wait, nil
		}
		t.trimmed.Add(got.Trimmed)
		for group, n := range got.Cut {
			cut[group] += n
		}
		took += got.Cost
		grows := t.length > 0 && got.Length > t.length
		if t.IsClosing() || !got.Over && !(got.More && (took < maxTrimming || grows && took < catchUp*maxTrimming)) {
			t.length = got.Length
			t.logPin(got.Pin)
			return wait, nil
		}
		if got.More {
			interval = 0 // continue at once
		} else {
			interval = RetentionInterval // only cut off
		}
		if got.Cost > 2*time.Millisecond { // very many groups: leave the server half of its time
			select {
			case <-time.After(got.Cost):
			case <-t.life.closing.Done():
			}
		}
	}
}

// logCut logs what HardMaxLen has cut off.
func (t *trimmer) logCut(cut map[string]int64) {
	if len(cut) == 0 {
		return
	}
	var groups []string
	for _, group := range slices.Sorted(maps.Keys(cut)) {
		groups = append(groups, fmt.Sprintf("%s: %d", cmp.Or(group, "fan-outs"), cut[group]))
	}
	t.cfg.Log.Error("Messages cut off before they were acked", errors.New("the stream exceeds Retention.HardMaxLen"),
		t.fields.Add(watermill.LogFields{"entries_by_group": strings.Join(groups, ", ")}))
}

// logPin logs what holds up retention, once for each group and consumer.
func (t *trimmer) logPin(pin xstream.Pin) {
	if pin.Age < pinnedAfter {
		if pin.ID == "" {
			t.pinned = pin
		}
		return
	}
	if t.pinned.ID != "" && t.pinned.Group == pin.Group && t.pinned.Consumer == pin.Consumer {
		return
	}
	t.pinned = pin
	t.cfg.Log.Error("Retention is held up: the oldest message is not acked", fmt.Errorf("it is %v old", pin.Age.Round(time.Second)),
		t.fields.Add(watermill.LogFields{"pinned_by_group": cmp.Or(pin.Group, "(fan-out)"), "pinned_by_consumer": cmp.Or(pin.Consumer, "(not delivered)"), "xid": pin.ID}))
}

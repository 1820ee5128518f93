package goxui

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/redis/go-redis/v9"
)

// entryID is the ID of a stream's entry: milliseconds of the server's clock, and a number.
type entryID struct{ ms, seq uint64 }

func parseID(s string) (entryID, error) {
	ms, seq, ok := strings.Cut(s, "-")
	if !ok {
		seq = "0"
	}
	var id entryID
	var errMS, errSeq error
	id.ms, errMS = strconv.ParseUint(ms, 10, 64)
	id.seq, errSeq = strconv.ParseUint(seq, 10, 64)
	if errMS != nil || errSeq != nil {
		return entryID{}, errors.New("an entry ID such as 1700000000000-0 is required")
	}
	return id, nil
}

func (id entryID) String() string { return fmt.Sprintf("%d-%d", id.ms, id.seq) }

func (id entryID) compare(other entryID) int {
	return cmp.Or(cmp.Compare(id.ms, other.ms), cmp.Compare(id.seq, other.seq))
}

// previous returns the greatest ID that is less, and 0-0 for itself.
func (id entryID) previous() entryID {
	switch {
	case id.seq > 0:
		return entryID{id.ms, id.seq - 1}
	case id.ms > 0:
		return entryID{id.ms - 1, math.MaxUint64}
	}
	return id
}

func (id entryID) next() entryID {
	if id.seq == math.MaxUint64 {
		return entryID{id.ms + 1, 0}
	}
	return entryID{id.ms, id.seq + 1}
}

// timeOf returns when Redis stored an entry; the zero time if the ID says no such time.
func timeOf(id string) time.Time {
	parsed, err := parseID(id)
	if err != nil || parsed.ms == 0 || parsed.ms > math.MaxInt64/1_000_000 {
		return time.Time{}
	}
	return time.UnixMilli(int64(parsed.ms)).UTC()
}

// ageOf returns the age of an entry for a page.
func ageOf(id string) string {
	at := timeOf(id)
	if at.IsZero() {
		return "–"
	}
	return ago(time.Since(at))
}

// ago returns a duration with one unit: "5 s", "12 min", "3 h", "4 d".
func ago(d time.Duration) string {
	switch {
	case d < 0:
		return "0 s"
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d d", int(d.Hours()/24))
}

// parseAge is time.ParseDuration that knows days, and refuses what is negative.
func parseAge(s string) (time.Duration, error) {
	s = strings.TrimSpace(s)
	unit := time.Duration(1)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		s, unit = days+"h", 24
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || d > math.MaxInt64/unit {
		return 0, errors.New("want an age such as 90m, 12h or 3d")
	}
	return d * unit, nil
}

// number returns n with its thousands apart, and a dash for -1, which is not known.
func number(n int64) string {
	if n < 0 {
		return "–"
	}
	digits := strconv.FormatInt(n, 10)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// rate returns a rate per second; less than 0 is not known.
func rate(v float32) string {
	switch {
	case v < 0:
		return "–"
	case v == 0 || v >= 10:
		return number(int64(math.Round(float64(v))))
	}
	return strconv.FormatFloat(float64(v), 'f', 1, 32)
}

// safe returns what somebody else has written as one line in which nothing is invisible, and
// nothing turns the direction of what follows: what cannot be printed is escaped as in Go.
// HTML's characters are the templates' matter.
func safe(s string) string {
	printable := func(r rune) bool { return r != utf8.RuneError && strconv.IsPrint(r) }
	if strings.IndexFunc(s, func(r rune) bool { return !printable(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for i, size := 0, 0; i < len(s); i += size {
		var r rune
		if r, size = utf8.DecodeRuneInString(s[i:]); printable(r) {
			b.WriteRune(r)
			continue
		}
		quoted := strconv.Quote(s[i : i+size])
		b.WriteString(quoted[1 : len(quoted)-1])
	}
	return b.String()
}

// short is safe, cut to a number of characters.
func short(most int, s string) string {
	if len(s) > 4*most+4 {
		s = s[:4*most+4] // more than enough of them
	}
	runes := []rune(safe(s))
	if len(runes) <= most {
		return string(runes)
	}
	return string(runes[:most-1]) + "…"
}

// lines is safe, but for line ends and tabs.
func lines(s string) string {
	all := strings.Split(s, "\n")
	for i, line := range all {
		all[i] = safe(strings.ReplaceAll(strings.TrimSuffix(line, "\r"), "\t", "    "))
	}
	return strings.Join(all, "\n")
}

// failure is an error for whoever looks at the page.
type failure struct {
	status int
	text   string
}

func (f failure) Error() string { return f.text }

// errNoAnswer is the answer when Redis has not answered in time.
var errNoAnswer = failure{503, "Redis does not answer."}

// refused reports whether an error is the server's answer.
func refused(err error) bool {
	var reply redis.Error
	return errors.As(err, &reply) && !errors.Is(err, redis.Nil)
}

// replyHas reports whether it is an answer of the server's with this in it.
func replyHas(err error, text string) bool {
	var reply redis.Error
	return errors.As(err, &reply) && strings.Contains(reply.Error(), text)
}

// unanswered reports whether Redis was not reached, or has not answered.
func unanswered(err error) bool {
	var broken net.Error
	return errors.As(err, &broken) || errors.Is(err, redis.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, context.DeadlineExceeded)
}

// explain returns what a page says about an error. A server quotes the arguments of a command that
// it does not know, which may be anything; addresses are nobody's business who looks at a page.
func explain(err error) string {
	var f failure
	var reply redis.Error
	switch {
	case errors.As(err, &f):
		return f.text
	case errors.As(err, &reply):
		text, _, _ := strings.Cut(err.Error(), ", with args beginning with")
		return "Redis refuses: " + short(300, text)
	case unanswered(err):
		return errNoAnswer.text
	}
	return short(300, err.Error())
}

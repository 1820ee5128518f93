package sim

import (
	"hash/fnv"
	"math/rand/v2"
	"strconv"
	"time"
)

// newDice returns a random source for one actor, so that it does not depend on what others
// draw, or in which order.
func newDice(seed uint64, actor string, number int) *rand.Rand {
	h := fnv.New64a()
	_, _ = h.Write([]byte(actor))
	_, _ = h.Write([]byte(strconv.Itoa(number)))
	return rand.New(rand.NewPCG(seed, h.Sum64()))
}

// between returns a duration from least up to most.
func between(dice *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(dice.Int64N(int64(most-least)+1))
}

func pick[T any](dice *rand.Rand, things ...T) T { return things[dice.IntN(len(things))] }

// chance is true with that probability.
func chance(dice *rand.Rand, p float64) bool { return dice.Float64() < p }

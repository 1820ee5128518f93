package main

import (
	"image/png"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestGrowth(t *testing.T) {
	e := testEnv(t, smallest)
	data := &growthData{}
	for i := range sweeps {
		for _, x := range sweeps[i].xs[:2] {
			points, err := sweeps[i].measure(e, x, 1)
			require.NoError(t, err)
			require.Len(t, points, len(sweeps[i].systems)*len(sweeps[i].pictures))
			for _, p := range points {
				assert.Positive(t, p.Y, "%+v", p)
			}
			data.Points = append(data.Points, points...)
		}
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "data.json")
	require.NoError(t, writeJSON(file, data))
	require.NoError(t, command([]string{"growth", "-draw", "-dir", dir}, nil))
	for _, s := range sweeps {
		for _, p := range s.pictures {
			f, err := os.Open(filepath.Join(dir, p.file+".png"))
			require.NoError(t, err)
			defer f.Close()
			image, err := png.DecodeConfig(f)
			require.NoError(t, err)
			assert.Equal(t, [2]int{900, 550}, [2]int{image.Width, image.Height})
		}
	}
}

func TestShort(t *testing.T) {
	for want, x := range map[string]float64{"0": 0, "0.5": 0.5, "256": 256, "1Ki": 1024, "64Ki": 65536, "1Mi": 1 << 20, "10k": 10_000, "1M": 1_000_000} {
		assert.Equal(t, want, short(x))
	}
}

// TestGrowth_Keep: points that were not measured again are kept; the others are there once.
func TestGrowth_Keep(t *testing.T) {
	file := filepath.Join(t.TempDir(), "data.json")
	old := growthData{Points: []point{{"payload-publish", rate, "ours", 16, 1}, {"topics", rate, "ours", 1, 2}}}
	require.NoError(t, writeJSON(file, old))
	anew := growthData{Points: []point{{"payload-publish", rate, "ours", 16, 3}}}
	require.NoError(t, anew.keep(file, regexp.MustCompile("payload")))
	assert.Equal(t, []point{{"payload-publish", rate, "ours", 16, 3}, {"topics", rate, "ours", 1, 2}}, anew.Points)
}

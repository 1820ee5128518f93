//go:build !race

package goxstreams_test

const raceEnabled = false

package model_test

import (
	"testing"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

func TestMain(m *testing.M) { testserver.Main(m) }

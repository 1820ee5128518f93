package goxstreams_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc64"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/goxstreams/watermill-goxstreams/internal/testserver"
)

// shiftClock makes the pending entries look as if the server's clock had been
// changed by d since their delivery: a step back leaves delivery times in the
// future. No command sets such a time, so it is changed in the result of DUMP,
// which has a checksum.
func shiftClock(t testing.TB, topic, group string, d time.Duration) {
	t.Helper()
	client := testserver.Client(t)
	// Nothing may be delivered or renewed between the two commands.
	var dumped string
	for {
		err := client.Watch(t.Context(), func(tx *redis.Tx) error {
			rows, err := tx.XPendingExt(t.Context(), &redis.XPendingExtArgs{Stream: topic, Group: group, Start: "-", End: "+", Count: 1000}).Result()
			if err != nil {
				return err
			}
			require.NotEmpty(t, rows)
			if dumped, err = tx.Dump(t.Context(), topic).Result(); err != nil {
				return err
			}
			now, err := tx.Time(t.Context()).Result()
			if err != nil {
				return err
			}
			payload := []byte(dumped[:len(dumped)-8])
			shifted := 0
			for i := 0; i+8 <= len(payload); i++ {
				ms := binary.LittleEndian.Uint64(payload[i:])
				if age := now.UnixMilli() - int64(ms); age >= 0 && age < time.Hour.Milliseconds() {
					binary.LittleEndian.PutUint64(payload[i:], uint64(int64(ms)-d.Milliseconds()))
					i += 7
					shifted++
				}
			}
			require.GreaterOrEqual(t, shifted, len(rows), "delivery times, and those of consumers")
			payload = binary.LittleEndian.AppendUint64(payload, redisCRC(payload))
			_, err = tx.TxPipelined(t.Context(), func(p redis.Pipeliner) error {
				return p.RestoreReplace(t.Context(), topic, 0, string(payload)).Err()
			})
			return err
		}, topic)
		if err == redis.TxFailedErr {
			continue
		}
		require.NoError(t, err)
		return
	}
}

// redisCRC is Redis's CRC-64: Jones's polynomial, without inversion.
func redisCRC(b []byte) uint64 {
	return ^crc64.Update(^uint64(0), crc64.MakeTable(0x95ac9329ac4bc9b5), b)
}

func TestRedisCRC(t *testing.T) {
	require.Equal(t, uint64(0xe9c6d914c4b8d9ca), redisCRC([]byte("123456789"))) // src/crc64.c
	require.Zero(t, redisCRC(bytes.Repeat([]byte{0}, 8)))
}

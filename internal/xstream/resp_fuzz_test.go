package xstream

import "testing"

// FuzzReadings: whatever the input, the parser neither panics nor takes much more
// memory than its size.
func FuzzReadings(f *testing.F) {
	f.Add("*1\r\n*2\r\n$1\r\na\r\n*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nk\r\n$1\r\nv\r\n")
	f.Add("%1\r\n$1\r\na\r\n*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nk\r\n$1\r\nv\r\n")
	f.Add("-ERR no\r\n")
	f.Add("*1\r\n*2\r\n$1\r\na\r\n*1\r\n*2\r\n$3\r\n1-0\r\n_\r\n")
	f.Fuzz(func(t *testing.T, reply string) {
		got, err := (&resp{rest: reply}).readings()
		if err != nil {
			return
		}
		size := 0
		for _, r := range got {
			for _, e := range r.Entries {
				size += len(e.ID)
				for _, field := range e.Fields {
					size += len(field)
				}
			}
		}
		if size > len(reply) {
			t.Fatalf("%d bytes out of %d", size, len(reply))
		}
	})
}

// Package xstream has every command, script and reply of Redis Streams that the
// library uses. It knows no leases and no policy. Two rules hold in it:
//
//   - A command that must not run twice is one that go-redis does not send again
//     (redisx.OnceCmd).
//   - XCLAIM always says which delivery count it means, so that the count stays
//     exact whatever becomes of the answer.
//
// Scripts are required: every managed Redis allows EVAL. Rights says what is missing.
package xstream

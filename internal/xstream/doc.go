// Package xstream contains every Redis Streams command, script and reply that the
// library uses. It knows nothing about leases or policy. It follows two rules:
//
//   - A command that must not run twice is one that go-redis does not resend
//     (redisx.OnceCmd).
//   - XCLAIM always sets the delivery count explicitly, so that the count stays
//     exact even if the answer is lost.
//
// Scripts are required: every managed Redis allows EVAL. CheckRights reports
// missing permissions.
package xstream

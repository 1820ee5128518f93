// Package rules judges what producers and consumers did with a topic. It is given a journal of events and what Redis has in
// the end, and says which guarantee of the library was broken. internal/chaos feeds it from real servers and processes,
// internal/sim from a simulation.
//
// Everything is a pure function of the evidence: no clock is read, and times are Event.Mono, on one time axis whose beginning
// means nothing. It may be real or virtual.
//
// # The files, in the order of reading
//
//	event.go     what a journal says
//	state.go     what Redis has in the end
//	nature.go    what a message is, by its UUID
//	evidence.go  the journal, sorted for the rules
//	check.go     the rules
//	delayed.go   the rules about delayed messages
//	progress.go  the rule against starvation
//	waits.go     when an entry waits, for that rule
//	span.go      arithmetic of times
package rules

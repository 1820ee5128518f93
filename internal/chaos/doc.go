// Command chaos checks the library's guarantees with real servers and real processes: producers publish and consumers handle
// while processes and servers are killed, stopped and cut off from each other. Each process logs what it was told and what it
// did; in the end a checker compares the logs with what Redis still has. README.md says how to run it.
//
// # The files, in the order of reading
//
//	main.go      the flags; the modes: one run, one by one, soak
//	settings.go  what a run is made of
//	bench.go     a run: servers, proxies, processes, faults, the end
//	schedule.go  which fault strikes when, by the seed
//	faults.go    what can happen
//	network.go   the proxies between clients and servers
//	child.go     a process of ours, from outside
//	role.go      a process of ours, from inside
//	producer.go  publishes, and logs what Publish said
//	consumer.go  handles, and logs what it was given
//	journal.go   the logs
//	final.go     what Redis has in the end
//	report.go    what is printed
//	soak.go      goroutines, memory and connections over a long time
//	deploy/      servers, Sentinels, Clusters
//
// The rules themselves, and the events that they read, are in ../sim/rules: the simulation has the same.
package main

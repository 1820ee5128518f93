package main

// What it prints on the embedded server. The end of main is the end of the test: it exits when something is lost.
func Example() {
	main()
	// Output:
	// Ada: book (1)
	// Ada: lay out towels (1)
	// Ada: make the bed (1)
	// Ada: order breakfast (1)
	// Bob: book (1)
	// Bob: book, failed (1)
	// Bob: lay out towels (1)
	// Bob: make the bed (1)
	// Bob: order breakfast (1)
	// Eve: book, failed (3)
	// Dead: {"Room":"13","Guest":"Eve"} of handler book, exhausted after 3 deliveries: there is no room 13
}

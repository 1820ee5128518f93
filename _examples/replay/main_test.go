package main

// What it prints on the embedded server. The end of main is the end of the test: it exits when something is lost.
func Example() {
	main()
	// Output:
	// 1. The shop, with a bug.
	//   order 1, delivery 1: paid in EUR
	//   order 2, delivery 1: unknown currency CHF
	//   order 2, delivery 2: unknown currency CHF
	//   order 3, delivery 1: paid in EUR
	//   order 4, delivery 1: unknown currency CHF
	//   order 4, delivery 2: unknown currency CHF
	//   order 5, delivery 1: unknown currency ZZZ
	//   order 5, delivery 2: unknown currency ZZZ
	//   order 6, delivery 1: unknown currency CHF
	//   order 6, delivery 2: unknown currency CHF
	// 2. The bug is fixed. What died of it is replayed, the rest is deleted.
	//   1/4 replay: {"Number":2,"Currency":"CHF"}, exhausted: unknown currency CHF
	//   2/4 replay: {"Number":4,"Currency":"CHF"}, exhausted: unknown currency CHF
	//   3/4 delete: {"Number":5,"Currency":"ZZZ"}, exhausted: unknown currency ZZZ
	//   4/4 replay: {"Number":6,"Currency":"CHF"}, exhausted: unknown currency CHF
	// 3. The shop again. A replayed order is counted anew.
	//   order 2, delivery 1: paid in CHF
	//   order 4, delivery 1: paid in CHF
	//   order 6, delivery 1: paid in CHF
	// Paid before: [1 3], after the replay: [2 4 6]; dead letters left: 0
}

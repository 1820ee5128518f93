package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// completeTopic completes the first argument, and no other.
func (a *app) completeTopic(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.complete(cmd, func(ctx context.Context) ([]string, error) {
		client, err := a.connect(ctx)
		if err != nil {
			return nil, err
		}
		return streamNames(ctx, client, "")
	})
}

// completeTopicAndGroup completes the first two arguments.
func (a *app) completeTopicAndGroup(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) != 1 {
		return a.completeTopic(cmd, args, prefix)
	}
	return a.complete(cmd, func(ctx context.Context) ([]string, error) {
		client, err := a.connect(ctx)
		if err != nil {
			return nil, err
		}
		groups, err := client.XInfoGroups(ctx, args[0]).Result()
		names := make([]string, len(groups))
		for i, g := range groups {
			names[i] = g.Name
		}
		return names, err
	})
}

// completeConsumer completes a flag by the consumers of the topic and group in the arguments.
func (a *app) completeConsumer(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) < 2 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.complete(cmd, func(ctx context.Context) ([]string, error) {
		client, err := a.connect(ctx)
		if err != nil {
			return nil, err
		}
		consumers, err := client.XInfoConsumers(ctx, args[0], args[1]).Result()
		names := make([]string, len(consumers))
		for i, c := range consumers {
			names[i] = c.Name
		}
		return names, err
	})
}

// completePosition completes the positions that have a name.
var completePosition = cobra.FixedCompletions([]string{"start", "end"}, cobra.ShellCompDirectiveNoFileComp)

// complete asks Redis, but not for long: somebody waits with a finger on the key.
func (a *app) complete(cmd *cobra.Command, ask func(context.Context) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
	defer cancel()
	names, err := ask(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	offered := names[:0]
	for _, name := range names {
		if safe(name) == name { // the others cannot be typed either
			offered = append(offered, name)
		}
	}
	return offered, cobra.ShellCompDirectiveNoFileComp
}

const defaultLimit = 50

func addLimit(flags *pflag.FlagSet, limit *int) {
	flags.IntVarP(limit, "limit", "n", defaultLimit, "show this many at most; 0, and the default for json and csv: all")
}

// defaultLimit returns the limit, which is none for scripts that do not set it: they would
// not notice that something is missing.
func (a *app) defaultLimit(cmd *cobra.Command, limit int) int {
	if a.forScripts() && !cmd.Flags().Changed("limit") {
		return 0
	}
	return limit
}

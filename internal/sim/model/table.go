package model

var commandTable []*command

func init() {
	commandTable = []*command{
		{name: "ping", arity: -1, run: ping},
		{name: "select", arity: 2, run: selectDB},
		{name: "time", arity: 1, run: serverTime},
		{name: "info", arity: -1, run: info},
		{name: "hello", arity: -1, flags: noScript, run: hello},
		{name: "multi", arity: 1, flags: noScript, control: true, run: multi},
		{name: "exec", arity: 1, flags: noScript, control: true, run: exec},
		{name: "discard", arity: 1, flags: noScript, control: true, run: discard},

		{name: "client", arity: -2},
		{name: "client|id", arity: 2, flags: noScript, run: clientID},
		{name: "client|setname", arity: 3, flags: noScript, run: clientSetName},
		{name: "client|getname", arity: 2, flags: noScript, run: clientGetName},
		{name: "client|setinfo", arity: 4, flags: noScript, run: clientSetInfo, only: []Version{Redis86, Valkey91}},
		{name: "client|unblock", arity: -3, flags: noScript, run: clientUnblock},

		{name: "exists", arity: -2, run: exists},
		{name: "del", arity: -2, flags: write, run: del},
		{name: "type", arity: 2, run: typeOf},
		{name: "expire", arity: -3, flags: write, run: expire},
		{name: "pexpire", arity: -3, flags: write, run: pexpire},
		{name: "ttl", arity: 2, run: ttl},
		{name: "pttl", arity: 2, run: pttl},
		{name: "flushall", arity: -1, flags: write, run: flushAll},

		{name: "hset", arity: -4, flags: write | memory, run: hset},
		{name: "hget", arity: 3, run: hget},
		{name: "hdel", arity: -3, flags: write, run: hdel},
		{name: "hgetall", arity: 2, run: hgetall},
		{name: "hlen", arity: 2, run: hlen},

		{name: "xadd", arity: -5, flags: write | memory, run: xadd},
		{name: "xdel", arity: -3, flags: write, run: xdel},
		{name: "xtrim", arity: -4, flags: write, run: xtrim},
		{name: "xlen", arity: 2, run: xlen},
		{name: "xrange", arity: -4, run: xrange},
		{name: "xrevrange", arity: -4, run: xrevrange},
		{name: "xread", arity: -4, run: xread},
		{name: "xreadgroup", arity: -7, flags: write, run: xreadgroup},
		{name: "xack", arity: -4, flags: write, run: xack},
		{name: "xackdel", arity: -6, flags: write, run: xackdel, only: []Version{Redis86}},
		{name: "xpending", arity: -3, run: xpending},
		{name: "xclaim", arity: -6, flags: write, run: xclaim},
		{name: "xcfgset", arity: -2, flags: write, run: xcfgset, only: []Version{Redis86}},
		{name: "xidmprecord", arity: 5, flags: write, run: xidmprecord, only: []Version{Redis86}},

		{name: "xgroup", arity: -2},
		{name: "xgroup|create", arity: -5, flags: write | memory, run: xgroupCreate},
		{name: "xgroup|createconsumer", arity: 5, flags: write | memory, run: xgroupCreateConsumer},
		{name: "xgroup|delconsumer", arity: 5, flags: write, run: xgroupDelConsumer},
		{name: "xgroup|destroy", arity: 4, flags: write, run: xgroupDestroy},
		{name: "xgroup|setid", arity: -5, flags: write, run: xgroupSetID},
		{name: "xinfo", arity: -2},
		{name: "xinfo|stream", arity: -3, run: xinfoStream},
		{name: "xinfo|groups", arity: 3, run: xinfoGroups},
		{name: "xinfo|consumers", arity: 4, run: xinfoConsumers},

		{name: "eval", arity: -3, flags: noScript, run: eval},
		{name: "evalsha", arity: -3, flags: noScript, run: evalsha},
		{name: "script", arity: -2},
		{name: "script|load", arity: 3, flags: noScript, run: scriptLoad},
		{name: "script|exists", arity: -3, flags: noScript, run: scriptExists},
		{name: "script|flush", arity: -2, flags: noScript, run: scriptFlush},
	}
}

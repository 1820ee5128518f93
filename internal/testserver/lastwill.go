package testserver

import (
	"os"
	"os/exec"
	"syscall"
)

// lastWill makes sure that the shell script runs with args if this process ends
// before revoke is called. A test binary can end without any cleanup (a panic in a
// goroutine, -timeout, SIGKILL), and must not leave servers behind.
//
// The shell reads from a pipe whose other end only this process has open, so it
// waits until this process has ended.
func lastWill(script string, args ...string) (revoke func(), err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command("sh", append([]string{"-c", "read -r _\n" + script, "sh"}, args...)...)
	cmd.Stdin = r
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C must not kill the shell
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, err
	}
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		w.Close()
	}, nil
}

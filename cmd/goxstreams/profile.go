package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// profile is a connection with a name. Passwords stand elsewhere: in a variable of the environment,
// or in a file. Files are relative to the profiles' directory.
type profile struct {
	URL                  string `json:"url"`
	PasswordEnv          string `json:"password_env"`
	PasswordFile         string `json:"password_file"`
	SentinelPasswordEnv  string `json:"sentinel_password_env"`
	SentinelPasswordFile string `json:"sentinel_password_file"`
	Cluster              bool   `json:"cluster"`
	CA                   string `json:"tls_ca"`
	Certificate          string `json:"tls_cert"`
	Key                  string `json:"tls_key"`
}

// profilesFile is where the profiles are: $XDG_CONFIG_HOME or ~/.config on Linux.
func profilesFile() (string, error) {
	dir, err := os.UserConfigDir()
	return filepath.Join(dir, "goxstreams", "profiles.json"), err
}

// readProfiles returns the profiles, each as JSON: a mistake in one does not hinder the others.
func readProfiles() (file string, profiles map[string]json.RawMessage, err error) {
	if file, err = profilesFile(); err != nil {
		return "", nil, err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return file, nil, err
	}
	if err := json.Unmarshal(data, &profiles); err != nil {
		return file, nil, fmt.Errorf("%s: want an object of profiles: %w", file, err)
	}
	return file, profiles, nil
}

// useProfile fills the connection in from --profile; other flags come before it.
func (c *connection) useProfile() error {
	if c.profile == "" {
		return nil
	}
	if c.url != "" {
		return usagef("--profile, or --url: not both")
	}
	file, profiles, err := readProfiles()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return usagef("--profile: there is no %s", file)
	case err != nil:
		return usagef("--profile: %w", err)
	case profiles[c.profile] == nil:
		return usagef("--profile: %q is none of those in %s: %s", c.profile, file, strings.Join(slices.Sorted(maps.Keys(profiles)), ", "))
	}
	p, err := parseProfile(profiles[c.profile])
	if err == nil {
		err = c.use(p, filepath.Dir(file))
	}
	if err != nil {
		return usagef("--profile %s, in %s: %w", c.profile, file, err)
	}
	return nil
}

// passwordOption is one that go-redis takes after the question mark.
var passwordOption = regexp.MustCompile(`[?&](sentinel_)?password=`)

var errPasswordInURL = errors.New("url has a password: name a variable or a file with it, in password_env or password_file")

func parseProfile(data []byte) (p profile, err error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&p); err != nil {
		return p, err
	}
	if p.URL == "" {
		return p, errors.New("url is missing")
	}
	if passwordOption.MatchString(p.URL) {
		return p, errPasswordInURL
	}
	// What follows the last @ has no user, and may be no URL: Sentinel's has several hosts.
	if i := strings.LastIndex(p.URL, "@"); i >= 0 {
		scheme, user, _ := strings.Cut(p.URL[:i], "://")
		u, err := url.Parse("redis://" + user + "@host")
		if err != nil || scheme == p.URL[:i] {
			return p, errURL
		}
		if _, ok := u.User.Password(); ok {
			return p, errPasswordInURL
		}
	}
	return p, nil
}

func (c *connection) use(p profile, dir string) (err error) {
	if c.password, err = secret(dir, "password", p.PasswordEnv, p.PasswordFile); err != nil {
		return err
	}
	if c.sentinelPassword, err = secret(dir, "sentinel_password", p.SentinelPasswordEnv, p.SentinelPasswordFile); err != nil {
		return err
	}
	if c.sentinelPassword != "" && !strings.Contains(p.URL, "+sentinel://") {
		return errors.New("sentinel_password_env and sentinel_password_file need a URL with +sentinel")
	}
	c.url = p.URL
	c.cluster = c.cluster || p.Cluster
	c.ca = cmp.Or(c.ca, in(dir, p.CA))
	if c.certificate == "" && c.key == "" {
		c.certificate, c.key = in(dir, p.Certificate), in(dir, p.Key)
	}
	return nil
}

// secret returns a password; "" if the profile names neither a variable nor a file.
func secret(dir, name, env, file string) (string, error) {
	switch {
	case env != "" && file != "":
		return "", fmt.Errorf("%s_env, or %s_file: not both", name, name)
	case env != "":
		value := os.Getenv(env)
		if value == "" {
			return "", fmt.Errorf("%s_env: the variable %s is not set, or empty", name, env)
		}
		return value, nil
	case file != "":
		f, err := os.Open(in(dir, file))
		if err != nil {
			return "", fmt.Errorf("%s_file: %w", name, err)
		}
		defer f.Close()
		data, err := io.ReadAll(io.LimitReader(f, 1<<16)) // not all of a disk
		value := strings.TrimRight(string(data), "\r\n")
		if err == nil && value == "" {
			err = fmt.Errorf("%s is empty", f.Name())
		}
		if err != nil {
			return "", fmt.Errorf("%s_file: %w", name, err)
		}
		return value, nil
	}
	return "", nil
}

// in returns a path that is relative to dir, unless it is absolute.
func in(dir, path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

func completeProfile(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	_, profiles, _ := readProfiles() // without any there is nothing to offer
	return slices.Sorted(maps.Keys(profiles)), cobra.ShellCompDirectiveNoFileComp
}

//! Proxies in the environment of processes.

use std::process::Command;

/// Variables of the environment that may have the password of a proxy in them; programs look at them in upper case too.
const VARIABLES: [&str; 3] = ["https_proxy", "http_proxy", "all_proxy"];

/// Keeps passwords of proxies out of the environment of a process, which others may read for as long as it lives. What the site needs of
/// them is in its resource and a file.
pub fn hide_proxies(command: &mut Command) {
    for name in VARIABLES {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_inherits_no_proxy() {
        let mut command = Command::new("/usr/bin/env");
        command.env("HTTPS_PROXY", "http://me:mine@a:1").env("https_proxy", "http://me:mine@a:1");
        command.env("NO_PROXY", "corp");
        hide_proxies(&mut command);
        let inherited = String::from_utf8(command.output().unwrap().stdout).unwrap();
        assert!(inherited.contains("NO_PROXY=corp"), "{inherited}");
        assert!(!inherited.contains("me:mine"), "{inherited}");
    }
}

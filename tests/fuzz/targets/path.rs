//! Whatever a path says, the file that it leads to lies in the tenant's own directory. `{root}` is the safe root.
#![no_main]

use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};
use std::sync::LazyLock;

use beamline_worker::blocks::tenant_dir::{Absent, TenantDirs};
use beamline_worker::ids::TenantId;
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static ROOT: LazyLock<TempDir> = LazyLock::new(|| {
    let root = tempfile::tempdir().expect("a directory");
    let own = root.path().join("acme");
    std::fs::create_dir_all(own.join("dir")).expect("a directory");
    std::fs::create_dir(root.path().join("other")).expect("a directory");
    for file in ["acme/ok.txt", "acme/dir/inner.txt", "other/secret.txt", "secret.txt"] {
        std::fs::write(root.path().join(file), "x").expect("a file");
    }
    for (name, target) in [("etc", "/etc"), ("up", ".."), ("inner", "dir"), ("link", "/etc/passwd"), ("loop", "loop")] {
        std::os::unix::fs::symlink(target, own.join(name)).expect("a link");
        std::os::unix::fs::symlink(target, own.join("dir").join(name)).expect("a link");
    }
    root
});

fuzz_target!(|input: &str| {
    let root = ROOT.path();
    let path = input.replace("{root}", root.to_str().expect("a path"));
    let tenant = TenantId::parse("acme").expect("a tenant");
    let dirs = TenantDirs::new(vec![root.to_owned()]);
    let found = dirs.find(&tenant, &path, Absent::Refuse);
    if let Ok(place) = &found {
        let own = root.join("acme");
        let directory = real_path(&place.dir);
        assert!(directory.starts_with(&own), "{path:?} leads to {}", directory.display());
        let mut name = Path::new(place.name).components();
        assert!(matches!((name.next(), name.next()), (Some(Component::Normal(_)), None)), "{path:?}: {:?}", place.name);
        if let Ok(file) = place.open() {
            let file = real_path(&file);
            assert!(file.starts_with(&own), "{path:?} opens {}", file.display());
        }
    }
    assert!(found.is_err() || dirs.check(&path).is_ok(), "{path:?} is found, and was refused at the door");
});

fn real_path(open: &impl AsRawFd) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", open.as_raw_fd())).expect("an open file")
}

use std::os::unix::fs::{PermissionsExt, symlink};

use tempfile::TempDir;

use super::*;

fn tenant(id: &str) -> TenantId {
    TenantId::parse(id).unwrap()
}

/// A root in a directory of its own, and the path of `name` below it.
fn root() -> (TempDir, TenantDirs, impl Fn(&str) -> String) {
    let temp = TempDir::new().unwrap();
    let base = temp.path().to_str().unwrap().to_owned();
    let dirs = TenantDirs::new(vec![temp.path().to_owned()]);
    (temp, dirs, move |name| format!("{base}/{name}"))
}

#[track_caller]
fn code(found: Result<impl Sized, Fault>) -> u16 {
    found.err().expect("the path was accepted").cause.code()
}

#[test]
fn what_is_wrong_with_a_root_is_said_with_its_name() {
    let (temp, _, path) = root();
    std::fs::write(path("file"), "").unwrap();
    std::fs::create_dir(path("closed")).unwrap();
    std::fs::set_permissions(path("closed"), std::fs::Permissions::from_mode(0o555)).unwrap();
    let dirs = TenantDirs::new(["", "file", "missing", "closed"].map(|name| path(name).into()).into());
    let base = temp.path().display();
    let mut expected = vec![format!("{base}/file is not a directory"), format!("{base}/missing does not exist")];
    // Root may write there.
    if std::fs::write(path("closed/x"), "").is_err() {
        expected.push(format!("{base}/closed is read-only for the worker's user: fs.put will fail there"));
    }
    assert_eq!(dirs.complaints(), expected);
}

#[test]
fn only_files_below_a_root_can_be_meant() {
    let dirs = TenantDirs::new(vec!["/data".into(), "/data/deep/er".into()]);
    let refused = [
        "",
        "x",
        "data/x",
        "/",
        "/data",
        "/data/",
        "/data/.",
        "/data/x/",
        "/data/x/.",
        "/data/..",
        "/data/../etc/passwd",
        "/data/x/../y",
        "/data/x/..",
        "/database/x",
        "/etc/passwd",
        "/data/a\0b",
        "/data/deep/er",
        "//",
        "/data//",
        "..",
    ];
    for path in refused {
        let invalid = dirs.check(path).expect_err(path);
        assert_eq!((invalid.cause.code(), invalid.pointer.as_str()), (2003, "/job/path"), "{path:?}");
    }
    for path in ["/data/x", "/data/a/b/c.json", "/data//x", "/data/./x", "/data/...", "/data/a b\n", "/data/deep/x"] {
        assert!(dirs.check(path).is_ok(), "{path:?}");
    }
    assert!(TenantDirs::new(Vec::new()).check("/data/x").is_err());
}

#[test]
fn the_deepest_root_is_meant_in_any_order() {
    for roots in [["/data", "/data/deep"], ["/data/deep", "/data"]] {
        let dirs = TenantDirs::new(roots.map(PathBuf::from).to_vec());
        assert_eq!(dirs.locate("/data/deep/x/y").unwrap(), (Path::new("/data/deep"), vec!["x", "y"]));
        assert_eq!(dirs.locate("/data/deeper").unwrap(), (Path::new("/data"), vec!["deeper"]));
    }
    let slash = TenantDirs::new(vec!["/".into()]);
    assert_eq!(slash.locate("/etc/passwd").unwrap(), (Path::new("/"), vec!["etc", "passwd"]));
}

#[test]
fn a_tenant_has_a_directory_of_its_own_that_no_other_id_leads_to() {
    let dirs = TenantDirs::new(vec!["/data".into(), "/data/shared/all".into()]);
    let name = |id: &str| dirs.own_directory(Path::new("/data"), &tenant(id));
    assert_eq!(name("acme"), "acme");
    assert_eq!(name("../acme"), "=2E=2E=2Facme");
    let (long, longer) = (name(&"é".repeat(128)), name(&"é".repeat(127)));
    assert!(long.len() <= MAX_NAME_BYTES && long.starts_with("=C3=A9") && long != longer, "{long}");
    // The directory `shared` holds the inner root's tenants.
    assert!(name("shared").starts_with("shared=_"), "{}", name("shared"));
    // A machine's own directories are no tenant's.
    let slash = TenantDirs::new(vec!["/".into()]);
    assert!(slash.own_directory(Path::new("/"), &tenant("etc")).starts_with("etc=_"));
}

#[test]
fn directories_are_made_for_a_writer_only_and_for_nobody_else() {
    let (temp, dirs, at) = root();
    assert_eq!(code(dirs.find(&tenant("acme"), &at("a/b/x"), Absent::Refuse)), 2001);
    assert!(!temp.path().join("acme").exists());
    let path = at("a/b/x");
    let place = dirs.find(&tenant("acme"), &path, Absent::Create).unwrap();
    assert_eq!(place.name, "x");
    for made in ["acme", "acme/a", "acme/a/b"] {
        let mode = temp.path().join(made).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{made}");
    }
    assert!(!temp.path().join("acme/a/b/x").exists());
}

#[test]
fn no_symbolic_link_is_followed_wherever_it_stands() {
    let (temp, dirs, at) = root();
    let outside = TempDir::new().unwrap();
    std::fs::write(outside.path().join("secret"), "s").unwrap();
    let own = temp.path().join("acme");
    std::fs::create_dir_all(own.join("real")).unwrap();
    std::fs::write(own.join("real/x"), "mine").unwrap();
    symlink(outside.path(), own.join("out")).unwrap();
    symlink("real", own.join("in")).unwrap();
    symlink(outside.path().join("secret"), own.join("file")).unwrap();
    symlink("real/x", own.join("near")).unwrap();
    symlink("nowhere", own.join("dangling")).unwrap();
    symlink(outside.path(), temp.path().join("linked")).unwrap();
    let open = |id: &str, path: &str, absent| dirs.find(&tenant(id), &at(path), absent)?.open();
    for path in ["out/secret", "in/x", "file", "near", "dangling", "dangling/x"] {
        for absent in [Absent::Refuse, Absent::Create] {
            assert_eq!(code(open("acme", path, absent)), 2003, "{path}");
        }
    }
    assert_eq!(code(open("linked", "secret", Absent::Create)), 2003);
    assert!(open("acme", "real/x", Absent::Refuse).is_ok());
    for path in ["file", "near", "dangling", "real"] {
        let path = at(path);
        assert_eq!(code(dirs.find(&tenant("acme"), &path, Absent::Create).unwrap().check_replaceable()), 2003);
    }
}

#[test]
fn what_is_no_regular_file_is_refused_and_blocks_nobody() {
    let (temp, dirs, at) = root();
    let own = temp.path().join("acme");
    std::fs::create_dir_all(own.join("dir")).unwrap();
    let fifo = std::process::Command::new("mkfifo").arg(own.join("fifo")).status().unwrap();
    assert!(fifo.success());
    let _socket = std::os::unix::net::UnixListener::bind(own.join("socket")).unwrap();
    for name in ["dir", "fifo", "socket"] {
        let path = at(name);
        let place = dirs.find(&tenant("acme"), &path, Absent::Refuse).unwrap();
        assert_eq!(code(place.open()), 2003, "{name}");
        assert_eq!(code(place.check_replaceable()), 2003, "{name}");
    }
}

#[test]
fn a_file_is_no_directory_and_a_long_name_is_no_name() {
    let (temp, dirs, at) = root();
    std::fs::create_dir(temp.path().join("acme")).unwrap();
    std::fs::write(temp.path().join("acme/file"), "").unwrap();
    for path in [at("file/x"), at(&format!("{}/x", "n".repeat(256)))] {
        assert_eq!(code(dirs.find(&tenant("acme"), &path, Absent::Create)), 2001);
    }
}

#[test]
fn a_directory_that_was_opened_stays_the_same_when_its_path_changes() {
    let (temp, dirs, at) = root();
    let path = at("a/x");
    let place = dirs.find(&tenant("acme"), &path, Absent::Create).unwrap();
    std::fs::write(temp.path().join("acme/a/x"), "mine").unwrap();
    let outside = TempDir::new().unwrap();
    std::fs::write(outside.path().join("x"), "theirs").unwrap();
    std::fs::rename(temp.path().join("acme/a"), temp.path().join("acme/moved")).unwrap();
    symlink(outside.path(), temp.path().join("acme/a")).unwrap();
    assert_eq!(std::io::read_to_string(place.open().unwrap()).unwrap(), "mine");
}

@where py >nul 2>nul
@if errorlevel 1 (python "%~dp0install.py" %*) else (py "%~dp0install.py" %*)
@pause
